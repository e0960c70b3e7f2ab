// Sums of e^((x - m) / T) over chunks: the second pass of logit_stats_chunk.h with a factor on the exponent. At T = 1 the bits are the same.
#pragma once
#include "common/filtered_stats.h"
#include "cpu/logit_stats_chunk.h"

namespace unmask::cpu::UNMASK_ISA_NS {

// d = (x - m) scale, clamped, and e^d, for U vectors stage by stage (see exp_steps).
#define UNMASK_EACH for (int u = 0; u < U; ++u)
template <int U>
UNMASK_INLINE void tempered_exps(const vf* x, vf m, vf scale, vf* gap, vf* d, vf* e) {
  vf z[U], r[U];
  UNMASK_EACH gap[u] = vsub(x[u], m);
  UNMASK_EACH d[u] = vmul(gap[u], scale);
  UNMASK_EACH d[u] = vmax(vset(kExpMin), d[u]);  // NaN stays NaN
  UNMASK_EACH z[u] = vfma(d[u], vset(kLog2e), vset(kRoundMagic));
  UNMASK_EACH r[u] = vsub(vset(kRoundMagic), z[u]);
  UNMASK_EACH r[u] = vfma(d[u], vset(kLog2e), r[u]);
  UNMASK_EACH e[u] = vfma(vset(kExpC5), r[u], vset(kExpC4));
  UNMASK_EACH e[u] = vfma(e[u], r[u], vset(kExpC3));
  UNMASK_EACH e[u] = vfma(e[u], r[u], vset(kExpC2));
  UNMASK_EACH e[u] = vfma(e[u], r[u], vset(kExpC1));
  UNMASK_EACH e[u] = vfma(e[u], r[u], vset(1.0f));
  UNMASK_EACH e[u] = vmul(e[u], vshl23(z[u]));
}

// kApart: ids at m stay out of the sum. (The gap decides, not d: a high temperature can make d zero below the maximum.)
template <int U, bool kApart>
UNMASK_INLINE void add_tempered(const vf* x, vf m, vf scale, vf* s, vf* t) {
  vf gap[U], d[U], e[U];
  tempered_exps<U>(x, m, scale, gap, d, e);
  UNMASK_EACH s[u] = kApart ? vadd_where_nonzero(s[u], e[u], gap[u]) : vadd(s[u], e[u]);
  UNMASK_EACH t[u] = vfma(d[u], e[u], t[u]);
}
#undef UNMASK_EACH

// {m, sum of e, sum of d e}. Same order of additions as chunk_sums.
template <bool kApart, class T>
UNMASK_INLINE SumExp tempered_sums(const T* x, int n, float m, float scale) {
  const vf vm = vset(m), vscale = vset(scale);
  vf s[kChains], t[kChains], v[kChains], sum = vset(0.0f), tsum = vset(0.0f);
  const char* ahead = reinterpret_cast<const char*>(x) + kStatsChunk * sizeof(T);
  constexpr int kIds = kChains * kW, kBytes = kIds * static_cast<int>(sizeof(T));
  for (int i = 0; i < n;) {
    const int stop = i + 64 * kIds < n ? i + 64 * kIds : n;
    for (int u = 0; u < kChains; ++u) s[u] = t[u] = vset(0.0f);
    for (; i + kIds <= stop; i += kIds, ahead += kBytes) {
      for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(ahead + line, 0, 3);
      for (int u = 0; u < kChains; u += 2) load_pair(x + i + u * kW, &v[u], &v[u + 1]);
      add_tempered<kChains, kApart>(v, vm, vscale, s, t);
    }
    for (; i < stop; i += kPair) {
      if (i + kPair <= n) load_pair(x + i, &v[0], &v[1]);
      else load_pair_n(x + i, n - i, &v[0], &v[1]);
      add_tempered<2, kApart>(v, vm, vscale, s, t);
    }
    for (int u = 0; u < kChains; u += 2) {
      sum = vadd(sum, vadd(s[u], s[u + 1]));
      tsum = vadd(tsum, vadd(t[u], t[u + 1]));
    }
  }
  return {m, vreduce_add(sum), vreduce_add(tsum)};
}

// A chunk whose maximum is m (see chunk_sum and chunk_sum_any).
template <class T>
UNMASK_INLINE SumExp tempered_chunk(const T* x, int n, float m, float scale) {
  if (!(m > neg_inf() && m < pos_inf())) return chunk_sum_infinite(x, n, m);
  SumExp sum = tempered_sums<false>(x, n, m, scale);
  sum.r -= 1.0f;
  return sum.r < 0.5f ? tempered_sums<true>(x, n, m, scale) : sum;
}

// Any number of logits, of which m is the largest: chunks of kStatsChunk, added in order.
template <bool kApart>
SumExp tempered_list_sums(const float* x, int64_t n, float m, float scale) {
  SumExp all{m, 0.0f, 0.0f};
  for (int64_t i = 0; i < n; i += kStatsChunk) {
    const int len = static_cast<int>(n - i < kStatsChunk ? n - i : kStatsChunk);
    const SumExp part = tempered_sums<kApart>(x + i, len, m, scale);
    all.r += part.r;
    all.t += part.t;
  }
  return all;
}
UNMASK_INLINE SumExp tempered_list(const float* x, int64_t n, float m, float scale) {
  if (m == pos_inf()) {
    int64_t infs = 0;
    for (int64_t i = 0; i < n; ++i) infs += x[i] == m;
    return {m, static_cast<float>(infs - 1), 0.0f};
  }
  SumExp sum = tempered_list_sums<false>(x, n, m, scale);
  sum.r -= 1.0f;
  return sum.r < 0.5f ? tempered_list_sums<true>(x, n, m, scale) : sum;
}

// e[i] = e^((x[i] - m) scale); e has room for whole vectors.
UNMASK_INLINE void tempered_masses(const float* x, int64_t n, float m, float scale, float* e) {
  if (m == pos_inf()) {
    for (int64_t i = 0; i < n; ++i) e[i] = x[i] == m ? 1.0f : 0.0f;
    return;
  }
  const vf vm = vset(m), vscale = vset(scale);
  for (int64_t i = 0; i < n; i += kPair) {
    vf v[2] = {vload(x + i), vload(x + i + kW)}, gap[2], d[2], out[2];  // beyond n: whatever is there
    tempered_exps<2>(v, vm, vscale, gap, d, out);
    vstore(e + i, out[0]);
    vstore(e + i + kW, out[1]);
  }
}

}  // namespace unmask::cpu::UNMASK_ISA_NS
