// block_attention without tensor cores: fp32, D above 128, and layouts that 16-byte copies cannot read. Correct, with no aim at speed.
//
// Work split: a warp takes one packed row. 32 keys at a time: lane = key for the scores (fp32 dot products over q in shared memory), lane =
// element for O = alpha O + P V, which lies in shared memory too. Bytes: K and V once per row, 2 n D elements, mostly from L2.
#pragma once
#include "cuda/block_attention_work.cuh"

namespace unmask::cuda {

template <FloatType kType>
UNMASK_KERNEL_BOUNDS(kAttentionWarps * 32, 1)
attention_rows(const AttentionJob j) {
  using Bits = typename Element<kType>::Bits;
  const int64_t kv_head = block_index() % j.kv_heads, number = block_index() / j.kv_heads;
  const RowTile tile = find_row_tile(j, number, reports_faults(j));
  zero_uncovered<kType>(j, tile, kv_head);
  const int row = warp_in_block();
  if (!tile.found || row >= tile.rows) return;

  auto* q = reinterpret_cast<float*>(dynamic_shared()) + row * 2 * j.dim;
  float* o = q + j.dim;
  const int64_t r = tile.row_begin + row, head = kv_head * j.group + r % j.group, token = tile.q_begin + r / j.group;
  const Bits* from = static_cast<const Bits*>(j.q) + token * j.q_stride[0] + head * j.q_stride[1];
  for (int64_t d = lane_id(); d < j.dim; d += 32) {
    q[d] = Element<kType>::value(from[d * j.q_stride[2]]);
    o[d] = 0.0f;
  }
  warp_sync();
  const RowView view = row_view(j, tile, row);
  const Bits* k = static_cast<const Bits*>(j.k) + tile.cache_row * j.k_stride[0] + kv_head * j.k_stride[1];
  const Bits* v = static_cast<const Bits*>(j.v) + tile.cache_row * j.v_stride[0] + kv_head * j.v_stride[1];
  SlotCursor cursor(j, tile.entry);
  float m = neg_inf(), l = 0.0f;
  for (int64_t first = 0; first < view.end; first += 32) {
    const int64_t key = first + lane_id();
    const bool seen = sees(j, tile, view, key);
    int64_t slot = 0;
    float s = neg_inf();
    if (seen) {
      slot = cursor.slot(key);
      const Bits* at = k + slot * j.k_stride[2];
      float sum = 0.0f;
      for (int64_t d = 0; d < j.dim; ++d) sum = UNMASK_FMA(q[d], Element<kType>::value(at[d * j.k_stride[3]]), sum);
      s = sum * j.scale;
    }
    float top = m;  // a NaN score is dropped here and comes back through its weight
    for (int lane = 0; lane < 32; ++lane) top = max_drop_nan(top, warp_get(s, lane));
    const float alpha = exp2_approx(m - safe_max(top)), p = seen ? exp2_approx(s - safe_max(top)) : 0.0f;
    m = top;
    l = l * alpha;
    for (int64_t d = lane_id(); d < j.dim; d += 32) o[d] *= alpha;
    const uint32_t all = warp_ballot(seen);
    for (int lane = 0; lane < 32; ++lane) {
      const float weight = warp_get(p, lane);
      const Bits* at = v + warp_get(slot, lane) * j.v_stride[2];
      if ((all >> lane & 1u) == 0) continue;  // an unseen V is not read: 0 x NaN must not reach this row
      l += weight;
      for (int64_t d = lane_id(); d < j.dim; d += 32)
        o[d] = UNMASK_FMA(weight, Element<kType>::value(at[d * j.v_stride[3]]), o[d]);
    }
  }
  const int64_t at = token * j.q_heads + head;
  const bool none = l == 0.0f;  // then o may be 0 x NaN
  const float by = 1.0f / l;
  Bits* out = static_cast<Bits*>(j.out) + at * j.dim;
  for (int64_t d = lane_id(); d < j.dim; d += 32) out[d] = none ? Bits{0} : Element<kType>::bits(o[d] * by);
  if (lane_id() == 0) j.lse[at] = natural_lse(m, l);
}

}  // namespace unmask::cuda
