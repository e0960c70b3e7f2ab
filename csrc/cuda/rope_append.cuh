// rope_append on CUDA; tests run this code on emulated warps (tests/emulate_warp.h). Formula: csrc/cpu/kernels/rope_append.cpp.
//
// Layout: q [T, Hq, D], k and v [T, Hkv, D], caches [R, Hkv, S, D], any strides. Bytes: q, k, v read once and written once,
// 2 (Hq + 2 Hkv) D elements a token. FLOPs: 3 per rotated element plus ~50 double operations per angle: memory-bound.
// Work split: a warp takes one token and kHeads neighbouring heads of [q | k | v]. A lane owns the pairs (i, i + F) with i = lane mod 32,
// so neighbouring lanes touch neighbouring elements, and an angle is computed once for kHeads heads. Nothing depends on the batch.
// When two tokens write one slot the later one wins: short calls look for it on the spot, long ones in a launch before.
#pragma once
#include "common/rope_angle.h"
#include "common/rope_append_params.h"
#include "cuda/common/elements.cuh"

namespace unmask::cuda {

constexpr int kHeads = 4;  // per warp
constexpr int kRopeWarps = 4;  // per block
constexpr int64_t kScanTokens = 128;  // up to here each warp looks for later writers of its slot itself

// True if a later token writes the slot that token t writes. `slots`: p.slot or p.v_slot.
UNMASK_DEVICE bool is_lost(const RopeParams& p, int64_t t, bool v) {
  const RopeTarget mine = rope_target(p, t);
  bool found = false;
  for (int64_t u = t + 1 + lane_id(); u < p.tokens; u += 32) {
    const RopeTarget other = rope_target(p, u);
    const bool same = v ? other.v_slot == mine.v_slot : other.slot == mine.slot;
    found = found || (other.live() && other.row == mine.row && same);
  }
  return warp_ballot(found) != 0;
}

// The launch before a long call: one warp per token fills both flags.
UNMASK_KERNEL_BOUNDS(kRopeWarps * 32, 6) rope_find_lost(const RopeParams p, uint8_t* k_lost, uint8_t* v_lost) {
  const int64_t t = block_index() * kRopeWarps + warp_in_block();
  if (t >= p.tokens) return;
  const bool k = is_lost(p, t, false), v = p.v_slot == p.slot ? k : is_lost(p, t, true);
  if (lane_id() == 0) k_lost[t] = k, v_lost[t] = v;
}

// One head: where its elements are read and written, and its norm.
template <FloatType kType>
struct RopeHead {
  using Bits = typename Element<kType>::Bits;
  const Bits* from = nullptr;
  Bits* to = nullptr;  // null: nothing to write
  int64_t from_stride = 1, to_stride = 1;
  const Bits* weight = nullptr;
  float scale = 1.0f;
  bool rotates = true;

  UNMASK_DEVICE float get(int64_t i) const {
    const float x = Element<kType>::value(from[i * from_stride]);
    return weight == nullptr ? x : rounded<kType>(rounded<kType>(x * scale) * Element<kType>::value(weight[i]));
  }
  UNMASK_DEVICE void set(int64_t i, float v) const { to[i * to_stride] = Element<kType>::bits(v); }
};

template <FloatType kType>
struct RopeWarp {
  using Bits = typename Element<kType>::Bits;
  const RopeParams& p;
  int64_t t;

  // Head h of [q | k | v]; `to` stays null where this token writes nothing.
  UNMASK_DEVICE RopeHead<kType> head(int64_t h, const RopeTarget& at, bool k_writes, bool v_writes) const {
    RopeHead<kType> x;
    if (h < p.q_heads) {
      x.from = static_cast<const Bits*>(p.q) + t * p.q_stride[0] + h * p.q_stride[1];
      x.from_stride = p.q_stride[2];
      x.to = static_cast<Bits*>(p.out) + (t * p.q_heads + h) * p.dim;
      x.weight = static_cast<const Bits*>(p.q_weight);
      return x;
    }
    const bool v = h >= p.q_heads + p.kv_heads;
    const int64_t g = h - p.q_heads - (v ? p.kv_heads : 0), slot = v ? at.v_slot : at.slot;
    const int64_t *in = v ? p.v_stride : p.k_stride, *cs = v ? p.v_cache_stride : p.k_cache_stride;
    x.from = static_cast<const Bits*>(v ? p.v : p.k) + t * in[0] + g * in[1];
    x.from_stride = in[2];
    if (v ? v_writes : k_writes) {
      x.to = static_cast<Bits*>(v ? p.v_cache : p.k_cache) + at.row * cs[0] + g * cs[1] + slot * cs[2];
      x.to_stride = cs[3];
    }
    x.weight = v ? nullptr : static_cast<const Bits*>(p.k_weight);
    x.rotates = !v;
    return x;
  }

  // 1 / sqrt(mean x^2 + eps) of every head that is normalised.
  UNMASK_DEVICE void find_scales(RopeHead<kType>* heads) const {
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {
      float sum = 0.0f;
      if (heads[j].to != nullptr && heads[j].weight != nullptr) {
        for (int64_t i = lane_id(); i < p.dim; i += 32) {
          const float x = Element<kType>::value(heads[j].from[i * heads[j].from_stride]);
          sum = UNMASK_FMA(x, x, sum);
        }
      }
      heads[j].scale = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(p.dim) + p.eps);
    }
  }

  UNMASK_DEVICE void rotate(const RopeHead<kType>* heads, int64_t pos) const {
    for (int64_t i = lane_id(); i < p.freqs; i += 32) {
      const float angle = static_cast<float>(pos) * p.inv_freq[i];
      CosSin a = cos_sin_below_huge(angle);
      if ((bits_of_float(angle) & 0x7FFFFFFFu) >= kHugeAngle)
        a = {static_cast<float>(cos(static_cast<double>(angle))), static_cast<float>(sin(static_cast<double>(angle)))};
#pragma unroll
      for (int j = 0; j < kHeads; ++j) {
        if (heads[j].to == nullptr || !heads[j].rotates) continue;
        const float x = heads[j].get(i), y = heads[j].get(i + p.freqs);
        heads[j].set(i, x * a.c - y * a.s);
        heads[j].set(i + p.freqs, y * a.c + x * a.s);
      }
    }
#pragma unroll
    for (int j = 0; j < kHeads; ++j) {  // the rest of K and Q behind the rotated part, and all of V
      if (heads[j].to == nullptr) continue;
      for (int64_t i = (heads[j].rotates ? 2 * p.freqs : 0) + lane_id(); i < p.dim; i += 32)
        heads[j].to[i * heads[j].to_stride] = heads[j].weight == nullptr ? heads[j].from[i * heads[j].from_stride]
                                                                         : Element<kType>::bits(heads[j].get(i));
    }
  }
};

template <FloatType kType>
UNMASK_KERNEL_BOUNDS(kRopeWarps * 32, 4)
rope_heads(const RopeParams p) {
  using Bits = typename Element<kType>::Bits;
  const int64_t total = p.q_heads + 2 * p.kv_heads, groups = (total + kHeads - 1) / kHeads;
  const int64_t unit = block_index() * kRopeWarps + warp_in_block(), t = unit / groups, first = unit % groups * kHeads;
  if (t >= p.tokens) return;
  const RopeTarget at = rope_target(p, t);
  if (!at.live()) {
    for (int64_t h = first; h < first + kHeads && h < p.q_heads; ++h)
      for (int64_t i = lane_id(); i < p.dim; i += 32) static_cast<Bits*>(p.out)[(t * p.q_heads + h) * p.dim + i] = 0;
    if (first == 0 && lane_id() == 0 && at.fault != 0 && p.status != nullptr) p.status[t * p.status_stride] |= at.fault;
    return;
  }
  bool k_writes = at.slot >= 0, v_writes = at.v_slot >= 0;
  if (p.k_lost != nullptr) k_writes = k_writes && p.k_lost[t] == 0, v_writes = v_writes && p.v_lost[t] == 0;
  else if (first + kHeads > p.q_heads && p.tokens > 1) {
    k_writes = k_writes && !is_lost(p, t, false);
    v_writes = v_writes && !is_lost(p, t, true);
  }
  const RopeWarp<kType> warp{p, t};
  RopeHead<kType> heads[kHeads];
#pragma unroll
  for (int j = 0; j < kHeads; ++j)
    if (first + j < total) heads[j] = warp.head(first + j, at, k_writes, v_writes);
  if (p.q_weight != nullptr || p.k_weight != nullptr) warp.find_scales(heads);
  warp.rotate(heads, at.pos);
}

}  // namespace unmask::cuda
