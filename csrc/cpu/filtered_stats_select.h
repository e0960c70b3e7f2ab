// Which ids a filter keeps, without sorting.
//
// collect   copies the ids between a floor and a ceiling out of a chunk, by rising id, so that everything after it touches few ids
// cut_after the first id, in the order (logit desc, id asc), through which the weights sum to more than a limit. One histogram a level over
//           the keys (floats as ordered integers): 2,048 bins of equal width over the keys that are left, a walk from the top to the bin where
//           the sum passes the limit, and on with the ids of that bin. Three levels at most reach bins one key wide; the ids there are ties
//           and taken by rising id. Weights are integers: a bin's sum does not depend on the order of its ids.
#pragma once
#include "common/filtered_stats.h"
#include "cpu/filtered_stats_kernels.h"
#include "cpu/vec.h"

namespace unmask::cpu::UNMASK_ISA_NS {

// ---- collecting ---------------------------------------------------------------------------------------------------
#if defined(UNMASK_AVX512)
using Ids = __m512i;
UNMASK_INLINE Ids load_ids(const int32_t* p) { return _mm512_loadu_si512(p); }
UNMASK_INLINE Ids rising_ids(int32_t first) {
  return _mm512_add_epi32(_mm512_set1_epi32(first),
                          _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
}
UNMASK_INLINE uint32_t kept_lanes(const Cut& cut, vf v, Ids id) {
  const __mmask16 tied = _mm512_cmp_ps_mask(v.v, _mm512_set1_ps(cut.x), _CMP_EQ_OQ);
  return vgt_mask(v, vset(cut.x)) | _mm512_mask_cmple_epi32_mask(tied, id, _mm512_set1_epi32(cut.last));
}
// Writes the lanes of the mask to out[at...], and something behind them; returns where the next ones go.
UNMASK_INLINE int64_t append(vf v, Ids id, uint32_t mask, float* out, int32_t* out_id, int64_t at) {
  _mm512_storeu_ps(out + at, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), v.v));
  _mm512_storeu_si512(out_id + at, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), id));
  return at + __builtin_popcount(mask);
}
#elif defined(UNMASK_AVX2)
using Ids = __m256i;
UNMASK_INLINE Ids load_ids(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
UNMASK_INLINE Ids rising_ids(int32_t first) {
  return _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
UNMASK_INLINE uint32_t kept_lanes(const Cut& cut, vf v, Ids id) {
  const __m256 tied = _mm256_cmp_ps(v.v, _mm256_set1_ps(cut.x), _CMP_EQ_OQ),
               later = _mm256_castsi256_ps(_mm256_cmpgt_epi32(id, _mm256_set1_epi32(cut.last)));
  return vgt_mask(v, vset(cut.x)) | static_cast<uint32_t>(_mm256_movemask_ps(_mm256_andnot_ps(later, tied)));
}
UNMASK_INLINE int64_t append(vf v, Ids id, uint32_t mask, float* out, int32_t* out_id, int64_t at) {
  const uint64_t bytes = _pdep_u64(mask, 0x0101010101010101u) * 0xFFu;  // a byte a lane
  const __m256i lanes =
      _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(_pext_u64(0x0706050403020100u, bytes))));
  _mm256_storeu_ps(out + at, _mm256_permutevar8x32_ps(v.v, lanes));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out_id + at), _mm256_permutevar8x32_epi32(id, lanes));
  return at + __builtin_popcount(mask);
}
#endif

// Ids base, base + 1, ... of x[0..n) with a logit in [floor, ceiling], behind the `at` that are there. Returns how many there are then.
// kRare: most vectors hold none, and a branch tells; else it would be guessed wrong too often.
template <bool kRare, class T>
int64_t collect(const T* x, int n, int32_t base, float floor, float ceiling, float* out, int32_t* out_id, int64_t at) {
  const vf bar = vset(floor), roof = vset(ceiling);
  constexpr int kBlock = 4 * kW;
  int i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    vf v[4];
    uint32_t in[4];
    for (int u = 0; u < 4; ++u) v[u] = vload(x + i + u * kW);
    for (int u = 0; u < 4; ++u) in[u] = vge_mask(v[u], bar) & vge_mask(roof, v[u]);
    if (kRare && (in[0] | in[1] | in[2] | in[3]) == 0) continue;
    for (int u = 0; u < 4; ++u) {
#if defined(UNMASK_PORTABLE)
      for (uint32_t mask = in[u]; mask != 0; mask &= mask - 1) {
        const int j = i + u * kW + __builtin_ctz(mask);
        out[at] = to_float(x[j]);
        out_id[at++] = base + j;
      }
#else
      at = append(v[u], rising_ids(base + i + u * kW), in[u], out, out_id, at);
#endif
    }
  }
  for (; i < n; ++i) {
    const float v = to_float(x[i]);
    out[at] = v;
    out_id[at] = base + i;
    at += v >= floor && v <= ceiling;
  }
  return at;
}

// Those of (x, id)[0..n) that the cut keeps, in place and in order. Returns how many.
inline int64_t keep(const Cut& cut, float* x, int32_t* id, int64_t n) {
  int64_t at = 0, i = 0;
#if !defined(UNMASK_PORTABLE)
  for (; i + kW <= n; i += kW) {
    const vf v = vload(x + i);
    const Ids ids = load_ids(id + i);
    at = append(v, ids, kept_lanes(cut, v, ids), x, id, at);  // at <= i: what it covers has been read
  }
#endif
  for (; i < n; ++i) {
    const float v = x[i];
    const int32_t own = id[i];
    x[at] = v;
    id[at] = own;
    at += cut.keeps(v, own);
  }
  return at;
}

// ---- the cut ------------------------------------------------------------------------------------------------------
constexpr int kBinBits = 11;
constexpr int kBins = 1 << kBinBits;

struct CountWeight {
  static constexpr bool kTiesTogether = true;  // all ids tied with the last one stay
};
UNMASK_INLINE uint64_t weight(const CountWeight&, int64_t) { return 1; }

struct MassWeight {
  const float* e;
  float unit;
  static constexpr bool kTiesTogether = false;
};
UNMASK_INLINE uint64_t weight(const MassWeight& w, int64_t i) { return mass_of(w.e[i], w.unit); }

UNMASK_INLINE int bit_length(uint32_t v) { return v == 0 ? 0 : 32 - __builtin_clz(v); }

// The cut behind the first of (x, id)[0..n) through which the weights sum to more than `limit`; none does: no cut.
template <class Weight>
Cut cut_after(const float* x, const int32_t* id, int64_t n, const Weight& w, uint64_t limit, uint32_t* key,
              int32_t* place) {
  if (n == 0) return no_cut();
  uint32_t low = 0xFFFFFFFFu, high = 0;
  for (int64_t i = 0; i < n; ++i) key[i] = logit_key(x[i]);
  for (int64_t i = 0; i < n; ++i) {
    low = key[i] < low ? key[i] : low;
    high = key[i] > high ? key[i] : high;
  }
  uint64_t bins[kBins];
  int64_t left = n;
  for (bool all = true;; all = false) {
    const int length = bit_length(high - low), shift = length > kBinBits ? length - kBinBits : 0;
    const int used = static_cast<int>((high - low) >> shift) + 1;
    for (int b = 0; b < used; ++b) bins[b] = 0;
    if (all) {
      for (int64_t i = 0; i < n; ++i) bins[(high - key[i]) >> shift] += weight(w, i);
    } else {
      for (int64_t j = 0; j < left; ++j) bins[(high - key[place[j]]) >> shift] += weight(w, place[j]);
    }
    int b = 0;
    while (b < used && bins[b] <= limit) limit -= bins[b++];
    if (b == used) return no_cut();
    const uint32_t top = high - (static_cast<uint32_t>(b) << shift), width = (1u << shift) - 1u;
    const uint32_t bottom = top - low > width ? top - width : low;
    int64_t count = 0;
    if (all) {
      for (int64_t i = 0; i < n; i += 16) {  // few of them: whole groups are passed over
        bool any = false;
        for (int64_t j = i; j < i + 16 && j < n; ++j) any |= key[j] - bottom <= top - bottom;
        if (!any) continue;
        for (int64_t j = i; j < i + 16 && j < n; ++j) {
          place[count] = static_cast<int32_t>(j);
          count += key[j] - bottom <= top - bottom;
        }
      }
    } else {
      for (int64_t j = 0; j < left; ++j) {
        const int32_t i = place[j];
        place[count] = i;
        count += key[i] - bottom <= top - bottom;
      }
    }
    low = 0xFFFFFFFFu, high = 0;
    for (int64_t j = 0; j < count; ++j) {
      const uint32_t k = key[place[j]];
      low = k < low ? k : low;
      high = k > high ? k : high;
    }
    left = count;
    if (low == high) break;
  }
  Cut cut{logit_of_key(high), INT32_MAX};
  if (Weight::kTiesTogether) return cut;
  for (int64_t j = 0; j < left; ++j) {
    const uint64_t own = weight(w, place[j]);
    if (own > limit) return {cut.x, id[place[j]]};
    limit -= own;
  }
  return cut;
}

}  // namespace unmask::cpu::UNMASK_ISA_NS
