// moe_route and moe_combine on CUDA; tests run this code on emulated warps (tests/emulate_warp.h).
//
//   route_tokens   one warp (a block of its own) per token: scores and choice keys in shared memory, then the top_k highest keys, one
//                  after the other: a lane looks through its E / 32 keys, two warp reductions give the highest and its lowest index
//   count_pairs    one warp per expert: how many pairs name it
//   place_pairs    one warp per expert: where its group begins (a sum over the counts before it), then the pairs in order, ranked by
//                  ballots: the sort is stable and needs no atomics, so that every run gives the same order
//   combine_rows   one warp per 256 elements of a token's output: top_k rows read once, added in the order of choice
//
// Layout: any strides for logits, row, bias, place, weight; dense rows of y, 16 bytes a load where they are aligned.
// Bytes: 4 E a token for the logits; the sort reads 8 T top_k bytes per expert from L2 (T = 64, top_k = 8, E = 256: 1 MB, twice); the sum
// (top_k + 1) D elements a token. FLOPs: 30 fp64 an expert and token, 2 fp32 an element. Latency decides: top_k rounds of two reductions,
// and three launches. At thousands of tokens the sort's E T top_k comparisons would want a sort of tiles; decoding has tens to hundreds.
// Bits: those of the CPU (common/moe_route.h): a softmax's partial sums are lanes here.
#pragma once
#include "common/moe_route.h"
#include "common/online.h"
#include "cuda/common/warp.cuh"
#include "cuda/elementwise.cuh"

namespace unmask::cuda {

constexpr int kPairWarps = 4;  // per block
static_assert(kSoftmaxLanes == 32, "a partial sum per lane");

// Floats and keys of one token: score[E], key[E], worth[groups].
inline int64_t route_shared_bytes(const RouteParams& p) { return (2 * p.experts + p.groups) * 4; }

struct RouteJob {
  RouteParams p;
  int32_t* count;  // [experts]: pairs of each
};

struct RouteWarp {
  const RouteParams& p;
  float* score;
  uint32_t *key, *worth;

  // Runs f(e) for this lane's experts.
  template <class F>
  UNMASK_DEVICE void each(const F& f) const {
    for (int e = lane_id(); e < p.experts; e += 32) f(e);
  }

  // The lowest index of the highest of n keys, in every lane; that key is then not choosable.
  UNMASK_DEVICE int take(uint32_t* keys, int n) const {
    uint32_t top = kNotChoosable, at = 0xFFFFFFFFu;
    for (int i = lane_id(); i < n; i += 32) {
      if (keys[i] > top) top = keys[i], at = static_cast<uint32_t>(i);
    }
    const uint32_t best = warp_max_u32(top);
    const int first = static_cast<int>(warp_min_u32(top == best ? at : 0xFFFFFFFFu));
    warp_sync();  // every lane has read
    if (lane_id() == first % 32) keys[first] = kNotChoosable;
    warp_sync();
    return first;
  }

  UNMASK_DEVICE void scores(int64_t token) const {
    if (!p.softmax) {
      each([&](int e) { score[e] = sigmoid_score(p.logit(token, e)); });
      return;
    }
    float top = neg_inf();
    each([&](int e) {
      const float x = p.logit(token, e);
      top = x > top ? x : top;  // NaN loses; the sum finds it
    });
    top = warp_max(top);
    double sum = 0.0;
    each([&](int e) {
      score[e] = rounded_exp(p.logit(token, e) - top);
      sum = sum + static_cast<double>(score[e]);
    });
    for (int by = 16; by > 0; by >>= 1) sum = sum + warp_get_xor(sum, by);
    const float total = static_cast<float>(sum);
    each([&](int e) { score[e] = score[e] / total; });
  }

  UNMASK_DEVICE void keep_groups() const {
    const int size = static_cast<int>(p.experts / p.groups), groups = static_cast<int>(p.groups);
    for (int g = 0; g < groups; ++g) {
      uint32_t first = kNotChoosable, second = kNotChoosable;  // of this lane
      for (int i = lane_id(); i < size; i += 32) {
        const uint32_t k = key[g * size + i];
        if (k > first) second = first, first = k;
        else if (k > second) second = k;
      }
      const uint32_t best = warp_max_u32(first);
      const int owner = lowest_bit(warp_ballot(first == best));
      const uint32_t next = warp_max_u32(lane_id() == owner ? second : first);
      if (lane_id() == 0) worth[g] = size > 1 ? choice_key(choice_of_key(best) + choice_of_key(next)) : best;
    }
    warp_sync();
    for (int64_t k = 0; k < p.kept; ++k) take(worth, groups);
    each([&](int e) {
      if (worth[e / size] != kNotChoosable) key[e] = kNotChoosable;  // its group was not taken
    });
    warp_sync();
  }

  UNMASK_DEVICE void run(int64_t token) const {
    scores(token);
    each([&](int e) { key[e] = choice_key(p.bias != nullptr ? score[e] + p.bias[e * p.bias_stride] : score[e]); });
    warp_sync();
    if (p.kept < p.groups) keep_groups();
    int64_t* const expert = p.expert + token * p.top_k;
    float* const weight = p.weight + token * p.top_k;
    for (int64_t j = 0; j < p.top_k; ++j) {
      const int e = take(key, static_cast<int>(p.experts));
      if (lane_id() == 0) expert[j] = e, weight[j] = score[e];
    }
    if (lane_id() == 0) finish_weights(p, weight);
  }
};

UNMASK_KERNEL_BOUNDS(32, 1) route_tokens(const RouteJob job) {
  const RouteParams& p = job.p;
  const int64_t token = block_index();
  if (!p.live(token)) {
    for (int64_t j = token * p.top_k + lane_id(); j < (token + 1) * p.top_k; j += 32)
      p.expert[j] = -1, p.weight[j] = 0.0f, p.place[j] = -1;
    return;
  }
  auto* const score = reinterpret_cast<float*>(dynamic_shared());
  auto* const key = reinterpret_cast<uint32_t*>(score + p.experts);
  RouteWarp{p, score, key, key + p.experts}.run(token);
}

UNMASK_DEVICE int32_t warp_sum_i32(int32_t v) {
  for (int by = 16; by > 0; by >>= 1) v = v + warp_get_xor(v, by);
  return v;
}

UNMASK_KERNEL_BOUNDS(kPairWarps * 32, 4) count_pairs(const RouteJob job) {
  const RouteParams& p = job.p;
  const int64_t e = block_index() * kPairWarps + warp_in_block(), pairs = p.tokens * p.top_k;
  if (e >= p.experts) return;
  int32_t rows = 0;
  for (int64_t i = lane_id(); i < pairs; i += 32) rows += p.expert[i] == e;
  rows = warp_sum_i32(rows);
  if (lane_id() == 0) job.count[e] = rows;
}

UNMASK_KERNEL_BOUNDS(kPairWarps * 32, 4) place_pairs(const RouteJob job) {
  const RouteParams& p = job.p;
  const int64_t e = block_index() * kPairWarps + warp_in_block(), pairs = p.tokens * p.top_k;
  if (e >= p.experts) return;
  int32_t before = 0;
  for (int64_t f = lane_id(); f < e; f += 32) before += static_cast<int32_t>(p.padded(job.count[f]));
  const int64_t begin = warp_sum_i32(before), rows = job.count[e], end = begin + p.padded(rows);
  int64_t at = begin;
  for (int64_t first = 0; first < pairs && at < begin + rows; first += 32) {
    const int64_t i = first + lane_id();
    const bool mine = i < pairs && p.expert[i] == e;
    const uint32_t all = warp_ballot(mine);
    if (mine) {
      const int64_t to = at + bit_count(all & ((1u << lane_id()) - 1u));
      p.place[i] = to;
      p.source[to] = i / p.top_k;
    }
    at += bit_count(all);
  }
  const bool last = e == p.experts - 1;  // it also answers for what is behind all groups
  for (int64_t i = begin + rows + lane_id(); i < (last ? p.capacity : end); i += 32) p.source[i] = 0;
  if (lane_id() == 0) {
    p.offsets[e] = static_cast<int32_t>(begin);
    if (last) p.offsets[e + 1] = static_cast<int32_t>(end);
  }
}

template <FloatType kType>
UNMASK_KERNEL_BOUNDS(kRowWarps * 32, 8)
combine_rows(const CombineParams p, const bool aligned) {
  using Bits = typename Element<kType>::Bits;
  using Part = RowPart<kType>;
  const int64_t n = p.dim, parts = (n + kWarpRun - 1) / kWarpRun;
  const int64_t unit = block_index() * kRowWarps + warp_in_block();
  const int64_t t = unit / parts, i = unit % parts * kWarpRun + lane_id() * kRun;
  if (t >= p.tokens || i >= n) return;
  float sum[kRun], v[kRun];
#pragma unroll
  for (int k = 0; k < kRun; ++k) sum[k] = 0.0f;
  for (int64_t j = 0; j < p.top_k; ++j) {
    const int64_t at = p.place[t * p.place_stride[0] + j * p.place_stride[1]];
    if (at < 0 || at >= p.rows) continue;
    const float weight = p.weight[t * p.weight_stride[0] + j * p.weight_stride[1]];
    Part::load(static_cast<const Bits*>(p.y) + at * p.y_row, i, n, aligned, v);
#pragma unroll
    for (int k = 0; k < kRun; ++k) sum[k] = sum[k] + v[k] * weight;
  }
  Part::store(static_cast<Bits*>(p.out) + t * n, i, n, aligned, sum);
}

}  // namespace unmask::cuda
