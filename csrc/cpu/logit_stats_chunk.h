// The two streaming passes of logit_stats over one chunk: maximum, then sum of exponentials.
//
// Lane order. Pairs of vectors hold 2 kW ids: even ids in the first, odd ids in the second for bf16 (one shift and one
// mask per pair of vectors instead of two widening loads), first and second half for the other types. A chunk that had
// to be copied to fp32 is read through EvenOdd if its logits were bf16, so that it is summed in the order, and to the
// bits, of the chunk in place.
#pragma once
#include "common/online.h"
#include "cpu/vec.h"

namespace unmask::cpu::UNMASK_ISA_NS {

constexpr int kAcc = 4;
constexpr int kStep = kAcc * kW;   // lane maxima of a chunk
constexpr int kPair = 2 * kW;      // ids of a pair of vectors

struct EvenOdd { float v; };
UNMASK_INLINE float to_float(EvenOdd x) { return x.v; }

template <class T> UNMASK_INLINE void load_pair(const T* p, vf* a, vf* b) {
  *a = vload(p);
  *b = vload(p + kW);
}
UNMASK_INLINE void load_pair(const EvenOdd* p, vf* a, vf* b) {
  float even[kW], odd[kW];
  for (int i = 0; i < kW; ++i) {
    even[i] = p[2 * i].v;
    odd[i] = p[2 * i + 1].v;
  }
  *a = vload(even);
  *b = vload(odd);
}
UNMASK_INLINE void load_pair(const bf16* p, vf* a, vf* b) {
#if defined(UNMASK_AVX512)
  const __m512i v = _mm512_loadu_si512(p);
  *a = {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16))};
  *b = {_mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
#elif defined(UNMASK_AVX2)
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  *a = {_mm256_castsi256_ps(_mm256_slli_epi32(v, 16))};
  *b = {_mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))))};
#else
  EvenOdd wide[kPair];
  for (int i = 0; i < kPair; ++i) wide[i].v = to_float(p[i]);
  load_pair(wide, a, b);
#endif
}
UNMASK_INLINE float minus_infinity(const float*) { return neg_inf(); }
UNMASK_INLINE EvenOdd minus_infinity(const EvenOdd*) { return {neg_inf()}; }
UNMASK_INLINE bf16 minus_infinity(const bf16*) { return {0xFF80}; }
UNMASK_INLINE fp16 minus_infinity(const fp16*) { return {0xFC00}; }
// The first n < kPair ids, the rest at -inf, in the same lanes.
template <class T>
UNMASK_INLINE void load_pair_n(const T* p, int n, vf* a, vf* b) {
  T wide[kPair];
  for (int i = 0; i < kPair; ++i) wide[i] = i < n ? p[i] : minus_infinity(p);
  load_pair(wide, a, b);
}
// ---- pass 1: lanes[kStep] = maxima of disjoint sets of ids; their maximum is the chunk's
// ------------------------------ NaN: loses, or comes out as a lane that is NaN; pass 2 finds it either way.
template <class T>
UNMASK_INLINE void chunk_max(const T* x, int n, float* lanes) {
  vf acc[kAcc];
  for (int a = 0; a < kAcc; ++a) acc[a] = vset(neg_inf());
  int i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int a = 0; a < kAcc; a += 2) {
      vf u, v;
      load_pair(x + i + a * kW, &u, &v);
      acc[a] = vmax(u, acc[a]);
      acc[a + 1] = vmax(v, acc[a + 1]);
    }
  for (; i < n; i += kPair) {
    vf u, v;
    if (i + kPair <= n) load_pair(x + i, &u, &v);
    else load_pair_n(x + i, n - i, &u, &v);
    acc[0] = vmax(u, acc[0]);
    acc[1] = vmax(v, acc[1]);
  }
  for (int a = 0; a < kAcc; ++a) vstore(lanes + a * kW, acc[a]);
}

#if !defined(UNMASK_PORTABLE)
// 16-bit floats order as 16-bit integers once the low 15 bits of negative ones are flipped: twice the lanes, no
// widening.
#if defined(UNMASK_AVX512)
using vi = __m512i;
UNMASK_INLINE vi load16(const void* p) { return _mm512_loadu_si512(p); }
UNMASK_INLINE vi set16(uint16_t x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }
UNMASK_INLINE vi max16(vi a, vi b) { return _mm512_max_epi16(a, b); }
UNMASK_INLINE vi flip16(vi v) {  // v ^ ((v >> 15) & 0x7FFF); its own inverse
  return _mm512_ternarylogic_epi32(v, _mm512_srai_epi16(v, 15), _mm512_set1_epi16(0x7FFF), 0x78);
}
UNMASK_INLINE void store16(uint16_t* p, vi v) { _mm512_storeu_si512(p, v); }
#else
using vi = __m256i;
UNMASK_INLINE vi load16(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
UNMASK_INLINE vi set16(uint16_t x) { return _mm256_set1_epi16(static_cast<int16_t>(x)); }
UNMASK_INLINE vi max16(vi a, vi b) { return _mm256_max_epi16(a, b); }
UNMASK_INLINE vi flip16(vi v) {
  return _mm256_xor_si256(v, _mm256_and_si256(_mm256_srai_epi16(v, 15), _mm256_set1_epi16(0x7FFF)));
}
UNMASK_INLINE void store16(uint16_t* p, vi v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
#endif

template <class T>
UNMASK_INLINE void chunk_max16(const T* x, int n, float* lanes) {
  const vi none = flip16(set16(minus_infinity(x).bits));
  vi acc[kAcc] = {none, none, none, none};
  int i = 0;
  for (; i + kAcc * kPair <= n; i += kAcc * kPair)
    for (int a = 0; a < kAcc; ++a) acc[a] = max16(flip16(load16(x + i + a * kPair)), acc[a]);
  for (; i < n; i += kPair) {
    T tail[kPair];
    const T* p = x + i;
    if (i + kPair > n) {
      for (int j = 0; j < kPair; ++j) tail[j] = minus_infinity(p);
      for (int j = 0; i + j < n; ++j) tail[j] = p[j];
      p = tail;
    }
    acc[0] = max16(flip16(load16(p)), acc[0]);
  }
  T bits[kStep];
  static_assert(kStep == 2 * kPair, "two vectors of 16-bit lanes");
  store16(&bits[0].bits, flip16(max16(acc[0], acc[1])));
  store16(&bits[kPair].bits, flip16(max16(acc[2], acc[3])));
  for (int j = 0; j < kStep; ++j) lanes[j] = to_float(bits[j]);
}
UNMASK_INLINE void chunk_max(const bf16* x, int n, float* lanes) { chunk_max16(x, n, lanes); }
UNMASK_INLINE void chunk_max(const fp16* x, int n, float* lanes) { chunk_max16(x, n, lanes); }
#endif

UNMASK_INLINE float max_of(const float* lanes) {
  vf m = vload(lanes);
  for (int i = kW; i < kStep; i += kW) m = vmax(vload(lanes + i), m);
  return vreduce_max(m);
}

// ---- pass 2 -------------------------------------------------------------------------------------------------------
// exp_neg of common/noise.h in lanes, for U vectors at once, stage by stage: one vector is a chain of 12 dependent
// operations, and interleaved in program order the chains keep both ports busy even with half a scheduler (a busy
// sibling hyperthread). d is clamped, not masked: e is then exactly 0 and so is its share of t.
#define UNMASK_EACH for (int u = 0; u < U; ++u)
// kApart: an id at the maximum, where d = 0, stays out of the sum.
template <int U, bool kApart>
UNMASK_INLINE void exp_steps(const vf* x, vf m, vf* s, vf* t) {
  vf d[U], z[U], r[U], q[U];
  UNMASK_EACH d[u] = vsub(x[u], m);
  UNMASK_EACH d[u] = vmax(vset(kExpMin), d[u]);  // NaN stays NaN
  UNMASK_EACH z[u] = vfma(d[u], vset(kLog2e), vset(kRoundMagic));
  UNMASK_EACH r[u] = vsub(vset(kRoundMagic), z[u]);
  UNMASK_EACH r[u] = vfma(d[u], vset(kLog2e), r[u]);
  UNMASK_EACH q[u] = vfma(vset(kExpC5), r[u], vset(kExpC4));
  UNMASK_EACH q[u] = vfma(q[u], r[u], vset(kExpC3));
  UNMASK_EACH q[u] = vfma(q[u], r[u], vset(kExpC2));
  UNMASK_EACH q[u] = vfma(q[u], r[u], vset(kExpC1));
  UNMASK_EACH q[u] = vfma(q[u], r[u], vset(1.0f));
  UNMASK_EACH q[u] = vmul(q[u], vshl23(z[u]));
  UNMASK_EACH s[u] = kApart ? vadd_where_nonzero(s[u], q[u], d[u]) : vadd(s[u], q[u]);
  UNMASK_EACH t[u] = vfma(d[u], q[u], t[u]);
}
#undef UNMASK_EACH

#if defined(UNMASK_AVX512)
constexpr int kChains = 4;
#else
constexpr int kChains = 2;  // 16 registers
#endif

// What is read next, fetched into the cache while this chunk is summed: the first pass over it then starts warm. One row goes to L1; two
// rows and the chunk that was made of them would evict each other there (fp32: 48 KB), so they go to L2.
template <int kRows>
struct Ahead {
  const char* at[kRows];
};
template <int kRows>
UNMASK_INLINE void fetch(Ahead<kRows>* next, int bytes) {
  for (int r = 0; r < kRows; ++r) {
    for (int line = 0; line < bytes; line += 64) __builtin_prefetch(next->at[r] + line, 0, kRows == 1 ? 3 : 2);
    next->at[r] += bytes;
  }
}
template <class T> UNMASK_INLINE Ahead<1> chunk_after(const T* x) {
  return {{reinterpret_cast<const char*>(x) + kStatsChunk * sizeof(T)}};
}

// Each accumulator takes 64 terms before it is added to a second one: equal logits would else round the same way up to
// 1,024 times.
template <bool kApart, class T, int kRows>
UNMASK_INLINE SumExp chunk_sums(const T* x, int n, float m, Ahead<kRows> ahead) {
  const vf vm = vset(m);
  vf s[kChains], t[kChains], v[kChains], sum = vset(0.0f), tsum = vset(0.0f);
  constexpr int kIds = kChains * kW, kBytes = kIds * static_cast<int>(sizeof(T));
  for (int i = 0; i < n;) {
    const int stop = i + 64 * kIds < n ? i + 64 * kIds : n;
    for (int u = 0; u < kChains; ++u) s[u] = t[u] = vset(0.0f);
    for (; i + kIds <= stop; i += kIds) {
      fetch(&ahead, kBytes);
      for (int u = 0; u < kChains; u += 2) load_pair(x + i + u * kW, &v[u], &v[u + 1]);
      exp_steps<kChains, kApart>(v, vm, s, t);
    }
    for (; i < stop; i += kPair) {
      if (i + kPair <= n) load_pair(x + i, &v[0], &v[1]);
      else load_pair_n(x + i, n - i, &v[0], &v[1]);
      exp_steps<2, kApart>(v, vm, s, t);
    }
    for (int u = 0; u < kChains; u += 2) {
      sum = vadd(sum, vadd(s[u], s[u + 1]));
      tsum = vadd(tsum, vadd(t[u], t[u + 1]));
    }
  }
  const float total = vreduce_add(sum);
  return {m, kApart ? total : total - 1.0f, vreduce_add(tsum)};
}

// All ids, then minus the 1 at the maximum: exact enough while the rest is at least half of it. A chunk whose maximum stands out is
// summed once more without it (never two ids at the maximum: then the rest is at least 1).
template <class T, int kRows>
UNMASK_INLINE SumExp chunk_sum(const T* x, int n, float m, const Ahead<kRows>& ahead) {
  const SumExp sum = chunk_sums<false>(x, n, m, ahead);
  return sum.r < 0.5f ? chunk_sums<true>(x, n, m, ahead) : sum;
}

// m is -inf or +inf, or NaN: nothing finite decides. Counts the ids at +inf; a NaN gives r = NaN.
template <class T>
SumExp chunk_sum_infinite(const T* x, int n, float m) {
  int nans = 0, infs = 0;  // counted: GCC 12 turns a conditional "r = NaN" into a maximum, which drops it
  for (int i = 0; i < n; ++i) {
    const float v = to_float(x[i]);
    nans += v != v;
    infs += v == pos_inf();
  }
  return {m, nans > 0 ? quiet_nan() : static_cast<float>(infs - 1), 0.0f};
}

template <class T, int kRows>
UNMASK_INLINE SumExp chunk_sum_any(const T* x, int n, float m, const Ahead<kRows>& ahead) {
  return m > neg_inf() && m < pos_inf() ? chunk_sum(x, n, m, ahead) : chunk_sum_infinite(x, n, m);
}

}  // namespace unmask::cpu::UNMASK_ISA_NS
