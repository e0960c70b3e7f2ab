// Filters that keep many ids, judged from a sample: every 32nd id of the row.
//
// top-k beyond what lane maxima can tell: a floor under slightly more than k ids, which the count of what is collected proves or refutes.
//
// top-p: a flat softmax keeps tens of thousands, and lists of them cost more than reading the row again.
// The sample says between which two logits the cut lies. One pass over the row (now in L2) then adds up what lies above that
// bracket, in fp32 as the sum over the row; only the ids inside are collected, and the cut is found among them. The sum also proves that the
// cut does lie inside; where the sample misled, the caller falls back to lists.
#pragma once
#include "common/filtered_stats.h"
#include "cpu/filtered_stats_sums.h"

namespace unmask::cpu::UNMASK_ISA_NS {

constexpr int kSampleEvery = 32;
constexpr int kListShare = 16;  // lists pay for up to V / 16 ids
constexpr int64_t kHeadVocab = 16384;  // below it a sample says little, and lists are short

// How many of x[0..n) are at least v. n is a multiple of kW, or what follows is +inf and counts.
UNMASK_INLINE int64_t count_from(const float* x, int64_t n, float v) {
  const vf bar = vset(v);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kW) count += __builtin_popcount(vge_mask(vload(x + i), bar));
  return count;
}

// A logit that about `wanted` of the sample are at or above, and few more; no larger than m. -inf if there are not so many.
UNMASK_INLINE float guess_floor(const float* x, int64_t n, int64_t wanted, float m) {
  uint32_t low = logit_key(neg_inf()), high = logit_key(m);
  for (int i = 0; i < 20; ++i) {
    const uint32_t mid = low + (high - low) / 2;
    (count_from(x, n, logit_of_key(mid)) >= wanted ? low : high) = mid;
  }
  return logit_of_key(low);
}

// ---- the bracket --------------------------------------------------------------------------------------------------
struct Bracket { float low, high; };

// The mass of the sample below v. The sample is padded to whole vectors with x = +inf.
UNMASK_INLINE float mass_below(const float* x, const float* e, int64_t n, float v) {
  const vf bar = vset(v);
  vf sum = vset(0.0f);
  for (int64_t i = 0; i < n; i += kW) {
#if defined(UNMASK_AVX512)
    sum = {_mm512_mask_add_ps(sum.v, _mm512_cmp_ps_mask(vload(x + i).v, bar.v, _CMP_LT_OQ), sum.v, vload(e + i).v)};
#elif defined(UNMASK_AVX2)
    sum = vadd(sum, {_mm256_and_ps(vload(e + i).v, _mm256_cmp_ps(vload(x + i).v, bar.v, _CMP_LT_OQ))});
#else
    for (int l = 0; l < kW; ++l) sum.v[l] += x[i + l] < v ? e[i + l] : 0.0f;
#endif
  }
  return vreduce_add(sum);
}

// Between low and high the mass below passes `tail`, give or take what a sample may be off. No id below `floor` is kept, none is above m.
UNMASK_INLINE Bracket guess_bracket(const float* x, const float* e, int64_t n, float tail, float floor, float m) {
  Bracket b{floor, m};
  float above_low = m, below_high = floor;
  for (int i = 0; i < 12; ++i) {
    const float mid = 0.5f * b.low + 0.5f * above_low;
    (mass_below(x, e, n, mid) < 0.88f * tail ? b.low : above_low) = mid;
  }
  below_high = b.low;
  for (int i = 0; i < 12; ++i) {
    const float mid = 0.5f * b.high + 0.5f * below_high;
    (mass_below(x, e, n, mid) > 1.12f * tail ? b.high : below_high) = mid;
  }
  return b;
}

// ---- what lies above it -------------------------------------------------------------------------------------------
// x where it is above the bar, -inf elsewhere
UNMASK_INLINE vf only_above(vf x, vf bar) {
#if defined(UNMASK_AVX512)
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, bar.v, _CMP_GT_OQ), vset(neg_inf()).v, x.v)};
#elif defined(UNMASK_AVX2)
  return {_mm256_blendv_ps(vset(neg_inf()).v, x.v, _mm256_cmp_ps(x.v, bar.v, _CMP_GT_OQ))};
#else
  for (int l = 0; l < kW; ++l) x.v[l] = x.v[l] > bar.v[l] ? x.v[l] : neg_inf();
  return x;
#endif
}

// {m, sum of e, sum of d e} over the ids of a chunk that lie above `high`; m is the largest logit of the row.
template <class T>
SumExp head_sums(const T* x, int n, float high, float m, float scale) {
  const vf bar = vset(high), vm = vset(m), vscale = vset(scale);
  constexpr int kIds = kChains * kW;
  vf s[kChains], t[kChains], v[kChains], sum = vset(0.0f), tsum = vset(0.0f);
  for (int i = 0; i < n;) {
    const int stop = i + 64 * kIds < n ? i + 64 * kIds : n;
    for (int u = 0; u < kChains; ++u) s[u] = t[u] = vset(0.0f);
    for (; i + kIds <= stop; i += kIds) {
      for (int u = 0; u < kChains; u += 2) load_pair(x + i + u * kW, &v[u], &v[u + 1]);
      for (int u = 0; u < kChains; ++u) v[u] = only_above(v[u], bar);
      add_tempered<kChains, false>(v, vm, vscale, s, t);
    }
    for (; i < stop; i += kPair) {
      if (i + kPair <= n) load_pair(x + i, &v[0], &v[1]);
      else load_pair_n(x + i, n - i, &v[0], &v[1]);
      for (int u = 0; u < 2; ++u) v[u] = only_above(v[u], bar);
      add_tempered<2, false>(v, vm, vscale, s, t);
    }
    for (int u = 0; u < kChains; u += 2) {
      sum = vadd(sum, vadd(s[u], s[u + 1]));
      tsum = vadd(tsum, vadd(t[u], t[u + 1]));
    }
  }
  return {m, vreduce_add(sum), vreduce_add(tsum)};
}

}  // namespace unmask::cpu::UNMASK_ISA_NS
