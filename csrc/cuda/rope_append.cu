// rope_append on CUDA: checks (the CPU's own), output, one launch, for more than kScanTokens tokens two. Device code: rope_append.cuh.
#include "common/dense.h"
#include "common/register.h"
#include "common/rope_append_args.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/stream.h"
#include "cuda/rope_append.cuh"

namespace unmask::cuda {
namespace {

unsigned blocks_for(int64_t warps) {
  const int64_t blocks = (warps + kRopeWarps - 1) / kRopeWarps;
  if (blocks > INT32_MAX)
    fail("rope_append", "too many tokens for one launch: " + std::to_string(warps) + " warps of work");
  return static_cast<unsigned>(blocks);
}

Tensor rope_append(const Tensor& q, const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache, const Tensor& row,
                   const Tensor& pos, const Tensor& slot, const std::optional<Tensor>& v_slot,
                   const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight, const Tensor& inv_freq,
                   double eps, std::optional<Tensor> status) {
  check_rope_append(q, k, v, k_cache, v_cache, row, pos, slot, v_slot, q_weight, k_weight, inv_freq, eps, status);
  std::optional<Tensor> qw, kw;  // hold the dense copies, if any
  if (q_weight) qw = dense(*q_weight);
  if (k_weight) kw = dense(*k_weight);
  const Tensor freq = dense(inv_freq);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  const Launch launch("rope_append", q);
  RopeParams p = rope_params(q, k, v, k_cache, v_cache, row, pos, slot, v_slot ? *v_slot : slot, qw, kw, freq, eps,
                             status, out, 0);
  const int64_t groups = (p.q_heads + 2 * p.kv_heads + kHeads - 1) / kHeads;
  if (p.tokens == 0 || groups == 0 || p.dim == 0) return out;
  std::optional<Tensor> lost;
  if (p.tokens > kScanTokens) {
    lost = torch::stable::new_empty(q, {2 * p.tokens}, std::make_optional(ScalarType::Byte));
    auto* flags = static_cast<uint8_t*>(lost->mutable_data_ptr());
    rope_find_lost<<<blocks_for(p.tokens), kRopeWarps * 32, 0, launch.stream>>>(p, flags, flags + p.tokens);
    launch.check();
    p.k_lost = flags, p.v_lost = flags + p.tokens;
  }
  with_float_type("rope_append", q, [&](auto type) {
    rope_heads<decltype(type)::value><<<blocks_for(p.tokens * groups), kRopeWarps * 32, 0, launch.stream>>>(p);
  });
  launch.check();
  return out;
}

}  // namespace
}  // namespace unmask::cuda

UNMASK_IMPL(CUDA, rope_append, &unmask::cuda::rope_append)
