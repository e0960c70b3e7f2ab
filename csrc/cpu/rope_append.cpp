// rope_append: optional per-head RMSNorm, RoPE at each token's own position, K and V written into the cache in place. -> rotated q.
// Tokens are split over threads. When two tokens write one slot the later one wins, as in a serial loop: see lost_writes.
#include <algorithm>
#include <vector>

#include "common/dense.h"
#include "common/register.h"
#include "common/rope_append_args.h"
#include "cpu/alloc.h"
#include "cpu/layer_parts.h"
#include "cpu/parallel.h"
#include "cpu/rope_append_kernels.h"

namespace unmask::cpu {
namespace {

constexpr int64_t kGrainElements = 65536;  // ~10 us of work for one thread

// Marks the tokens whose write a later token of the call overwrites, so that threads never race for a slot. Empty if there are none,
// which rows and slots in increasing order (the usual call) show without sorting.
std::vector<uint8_t> lost_writes(const RopeParams& p, const int64_t* slot, int64_t stride) {
  const auto row_of = [&](int64_t t) { return p.row[t * p.row_stride]; };
  const auto slot_of = [&](int64_t t) { return slot[t * stride]; };
  bool increasing = true;
  for (int64_t t = 1; t < p.tokens && increasing; ++t)
    increasing = row_of(t - 1) < row_of(t) || (row_of(t - 1) == row_of(t) && slot_of(t - 1) < slot_of(t));
  if (increasing) return {};
  std::vector<int64_t> order;
  for (int64_t t = 0; t < p.tokens; ++t)  // a token that writes nothing overwrites nothing
    if (rope_target(p, t).live() && slot_of(t) >= 0) order.push_back(t);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return row_of(a) != row_of(b) ? row_of(a) < row_of(b) : slot_of(a) < slot_of(b);
  });
  std::vector<uint8_t> lost;
  for (size_t i = 1; i < order.size(); ++i) {
    const int64_t a = order[i - 1], b = order[i];
    if (row_of(a) != row_of(b) || slot_of(a) != slot_of(b)) continue;
    if (lost.empty()) lost.assign(static_cast<size_t>(p.tokens), 0);
    lost[static_cast<size_t>(a)] = 1;
  }
  return lost;
}

Tensor rope_append(const Tensor& q, const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache, const Tensor& row,
                   const Tensor& pos, const Tensor& slot, const std::optional<Tensor>& v_slot,
                   const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight, const Tensor& inv_freq,
                   double eps, std::optional<Tensor> status) {
  check_rope_append(q, k, v, k_cache, v_cache, row, pos, slot, v_slot, q_weight, k_weight, inv_freq, eps, status);
  std::optional<Tensor> qw, kw;
  if (q_weight) qw = dense(*q_weight);
  if (k_weight) kw = dense(*k_weight);
  Tensor out = empty_as<3>({q.size(0), q.size(1), q.size(2)}, q);
  rope_append_into(q, k, v, k_cache, v_cache, row, pos, slot, v_slot, qw, kw, dense(inv_freq), eps, status, out);
  return out;
}

}  // namespace

void rope_append_into(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                      const Tensor& row, const Tensor& pos, const Tensor& slot, const std::optional<Tensor>& v_slot,
                      const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight,
                      const Tensor& inv_freq, double eps, const std::optional<Tensor>& status, Tensor& out) {
  if (q.size(0) == 0) return;
  RopeParams p = rope_params(q, k, v, k_cache, v_cache, row, pos, slot, v_slot ? *v_slot : slot, q_weight, k_weight,
                             inv_freq, eps, status, out, dtype_code(q));
  const int64_t per_token = std::max<int64_t>(1, (p.q_heads + 2 * p.kv_heads) * p.dim);
  const int64_t grain = (kGrainElements + per_token - 1) / per_token;
  std::vector<uint8_t> k_lost, v_lost;
  if (p.tokens > grain) {
    k_lost = lost_writes(p, p.slot, p.slot_stride);
    if (v_slot) v_lost = lost_writes(p, p.v_slot, p.v_slot_stride);
    p.k_lost = k_lost.empty() ? nullptr : k_lost.data();
    p.v_lost = v_slot ? (v_lost.empty() ? nullptr : v_lost.data()) : p.k_lost;
  }
  const auto kernel = UNMASK_KERNEL(rope_append_tokens);
  parallel_for(p.tokens, grain, [&](int64_t begin, int64_t end) {
    float local[1024];
    std::vector<float> large;
    if (p.scratch_floats() > 1024) large.resize(static_cast<size_t>(p.scratch_floats()));
    kernel(p, begin, end, large.empty() ? local : large.data());
  });
}

}  // namespace unmask::cpu

UNMASK_IMPL(CPU, rope_append, &unmask::cpu::rope_append)
