// block_attention on CUDA: checks (the CPU's own), outputs, the plan, one launch; a memset of counters before it where splits merge through
// the workspace. Device code: block_attention_wgmma.cuh (Hopper, few rows), block_attention_mma.cuh (bf16, fp16), block_attention_plain.cuh (all else); the cut of the work: block_attention_plan.h.
#include <cstdlib>

#include <torch/csrc/stable/ops.h>

#include "common/block_attention_args.h"
#include "common/register.h"
#include "cuda/block_attention_launch.cuh"
#include "cuda/block_attention_plain.cuh"
#include "cuda/common/device.h"
#include "cuda/common/dispatch.h"

namespace unmask::cuda {
namespace {

constexpr const char* kOp = "block_attention";

// UNMASK_CUDA_ATTENTION=mma keeps the Hopper kernel out, so that one process can time the two side by side.
bool hopper_wanted() {
  const char* set = std::getenv("UNMASK_CUDA_ATTENTION");
  if (set == nullptr || *set == 0) return true;
  const std::string value = set;
  if (value != "mma" && value != "wgmma") fail_must_be(kOp, "UNMASK_CUDA_ATTENTION", "mma or wgmma", value);
  return value == "wgmma";
}

bool divisible(const Tensor& t, int64_t bytes) {  // base and all strides but the last; the last dimension is dense
  if (t.stride(t.dim() - 1) != 1 ||
      reinterpret_cast<uintptr_t>(t.const_data_ptr()) % static_cast<uintptr_t>(bytes) != 0)
    return false;
  for (int64_t d = 0; d + 1 < t.dim(); ++d)
    if (t.stride(d) * 2 % bytes != 0) return false;
  return true;
}

AttentionJob new_job(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& cu_q,
                     const Tensor& kv_row, const Tensor& seg, const std::optional<Tensor>& q_end,
                     const std::optional<Tensor>& mask, double scale, const std::optional<Tensor>& status,
                     const Tensor& out, const Tensor& lse) {
  const auto int64s = [](const Tensor& t) {
    return Strided<const int64_t>{static_cast<const int64_t*>(t.const_data_ptr()), t.stride(0)};
  };
  AttentionJob j{};
  j.q = q.const_data_ptr(), j.k = k_cache.const_data_ptr(), j.v = v_cache.const_data_ptr();
  j.out = out.mutable_data_ptr(), j.lse = static_cast<float*>(lse.mutable_data_ptr());
  std::copy_n(q.strides().data(), 3, j.q_stride);
  std::copy_n(k_cache.strides().data(), 4, j.k_stride);
  std::copy_n(v_cache.strides().data(), 4, j.v_stride);
  j.tokens = q.size(0), j.q_heads = q.size(1), j.dim = q.size(2);
  j.rows = k_cache.size(0), j.kv_heads = k_cache.size(1), j.slots = k_cache.size(2);
  j.group = j.q_heads / j.kv_heads;
  j.batch = kv_row.size(0), j.segments = seg.size(1);
  j.cu_q = int64s(cu_q), j.kv_row = int64s(kv_row);
  if (q_end) j.q_end = int64s(*q_end);
  j.seg = static_cast<const int64_t*>(seg.const_data_ptr());
  std::copy_n(seg.strides().data(), 3, j.seg_stride);
  if (mask) {
    j.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    j.mask_stride[0] = mask->size(0) > 1 ? mask->stride(0) : 0;
    j.mask_stride[1] = mask->stride(1), j.mask_stride[2] = mask->stride(2);
    j.q_max = mask->size(1), j.mask_width = mask->size(2);
  }
  if (status) j.status = {static_cast<int32_t*>(status->mutable_data_ptr()), status->stride(0)};
  j.scale = static_cast<float>(scale * 1.4426950408889634);
  return j;
}

template <FloatType kType>
void launch_plain(const AttentionJob& job, const AttentionPlan& plan, const Launch& launch) {
  attention_rows<kType><<<static_cast<unsigned>(plan.blocks), kAttentionWarps * 32,
                          static_cast<size_t>(plan.shared_bytes), launch.stream>>>(job);
  launch.check();
}

std::tuple<Tensor, Tensor> block_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                           const Tensor& cu_q, const Tensor& kv_row, const Tensor& seg,
                                           const std::optional<Tensor>& q_end, const std::optional<Tensor>& mask,
                                           double scale, std::optional<Tensor> status, bool batch_invariant) {
  check_block_attention(q, k_cache, v_cache, cu_q, kv_row, seg, q_end, mask, scale, status);
  const Launch launch(kOp, q);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, std::make_optional(ScalarType::Float));
  AttentionJob job = new_job(q, k_cache, v_cache, cu_q, kv_row, seg, q_end, mask, scale, status, out, lse);

  const AttentionShape shape{job.tokens,
                             job.batch,
                             job.q_heads,
                             job.kv_heads,
                             job.dim,
                             job.slots,
                             job.segments,
                             q.scalar_type() != ScalarType::Float,
                             divisible(k_cache, 16) && divisible(v_cache, 16) && divisible(q, 4),
                             hopper_wanted() && can_map(k_cache.sizes().data(), k_cache.strides().data()) &&
                                 can_map(v_cache.sizes().data(), v_cache.strides().data()),
                             batch_invariant};
  const DeviceFacts device = current_device(launch);
  const AttentionPlan plan =
      plan_attention(shape, {device.multiprocessors, device.shared_per_block, device.shared_per_multiprocessor,
                             device.major >= 9, device.has_hopper_kernels()});
  if (plan.blocks == 0) return {out, lse};
  if (plan.blocks > INT32_MAX)
    fail(kOp, "too much for one launch: " + std::to_string(plan.blocks) + " blocks of work, at most 2147483647");
  job.row_tile = plan.row_tile, job.splits = plan.splits, job.min_split_keys = plan.min_split_keys,
  job.stages = plan.stages, job.cluster = plan.cluster;
  std::optional<Tensor> partial, tickets;  // live until the launch; torch's allocator keeps the memory in stream order
  if (plan.partial_floats > 0) {
    const int64_t units = plan.blocks / plan.splits;
    partial = torch::stable::new_empty(q, {plan.partial_floats}, std::make_optional(ScalarType::Float));
    tickets = torch::stable::new_empty(q, {units}, std::make_optional(ScalarType::Int));
    job.partial = static_cast<float*>(partial->mutable_data_ptr());
    job.tickets = static_cast<uint32_t*>(tickets->mutable_data_ptr());
    launch.check(cudaMemsetAsync(job.tickets, 0, static_cast<size_t>(units) * 4, launch.stream));
  }
  if (!plan.tensor_cores)
    with_float_type(kOp, q, [&](auto type) { launch_plain<decltype(type)::value>(job, plan, launch); });
#if defined(UNMASK_WITH_SM90A)
  else if (plan.wgmma) launch_attention_wgmma(job, q.scalar_type() == ScalarType::BFloat16, plan, launch);
#endif
  else if (q.scalar_type() == ScalarType::BFloat16) launch_attention_bf16(job, plan, launch);
  else launch_attention_f16(job, plan, launch);
  return {out, lse};
}

}  // namespace
}  // namespace unmask::cuda

UNMASK_IMPL(CUDA, block_attention, &unmask::cuda::block_attention)
