// Bringing Q, K and V into the cells of block_attention_micro.h: widening, pairing, transposing, gathering through odd strides.
//
// Orders of d. A sum over d may run in any order as long as Q and K agree, and columns of O in any order that finish() undoes:
//   kNatural  d
//   kEvenOdd  per chunk of kPanel: the even d, then the odd ones. Widening bf16 is then one shift and one mask per 32-bit word, without
//             a shuffle (vpmovzx runs on one port and costs twice as much here).
//   kUnpack   per chunk of 32 (V with the native bf16 dot product): {8l + e}, then {8l + 4 + e}, l = 0..3, e = 0..3, which is what
//             unpacklo / unpackhi of two V rows leave.
#pragma once
#include <stddef.h>

#include "cpu/kernels/block_attention_micro.h"

namespace unmask::cpu::UNMASK_ISA_NS {
namespace {

enum Order { kNatural, kEvenOdd, kUnpack };

#if !defined(UNMASK_PORTABLE)
UNMASK_INLINE void widen_even_odd(const bf16* x, float* out) {
#if defined(UNMASK_AVX512)
  const __m512i u = _mm512_loadu_si512(x);
  _mm512_storeu_si512(out, _mm512_slli_epi32(u, 16));
  _mm512_storeu_si512(out + kW, _mm512_and_si512(u, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
#else
  const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_slli_epi32(u, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + kW),
                      _mm256_and_si256(u, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
#endif
}
#endif

UNMASK_INLINE int64_t even_odd_place(int64_t d) { return d / kPanel * kPanel + d % 2 * kW + d % kPanel / 2; }

// n elements of one row as floats in `order` (kEvenOdd: n is a multiple of kPanel).
template <Order order, class T>
UNMASK_INLINE void widen(const T* x, int64_t stride, int64_t n, float* out) {
  int64_t d = 0;
  if constexpr (order == kEvenOdd) {
    if (stride == 1) {
      for (; d < n; d += kPanel) widen_even_odd(x + d, out + d);
    } else {
      for (; d < n; ++d) out[even_odd_place(d)] = to_float(x[d * stride]);
    }
  } else {
    if (stride == 1)
      for (; d + kW <= n; d += kW) vstore(out + d, vload(x + d));
    for (; d < n; ++d) out[d] = to_float(x[d * stride]);
  }
}

// One row of D elements as cells: D floats in `order`, or D / 2 pairs in their own order.
template <class E, Order order, class T>
UNMASK_INLINE void pack_row(const T* x, int64_t stride, int64_t dim, float* out) {
  if constexpr (E::kDot) {
    if (stride == 1) {
      __builtin_memcpy(out, x, static_cast<size_t>(dim) * 2);
      return;
    }
    for (int64_t d = 0; d < dim; d += 2)
      out[d / 2] = bits_to_float(x[d * stride].bits | static_cast<uint32_t>(x[(d + 1) * stride].bits) << 16);
  } else {
    widen<order>(x, stride, dim, out);
  }
}

#if defined(UNMASK_AVX512)
// 16 x 16 cells: out[c * kPanel + r] = in[r * ld + c].
UNMASK_INLINE void transpose_cells(const float* in, int64_t ld, float* out) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(in + i * ld);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2)
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // a[i + j]: in each 128-bit lane l, column 4l + j of rows i .. i + 3
    const __m512d p = _mm512_castps_pd(b[i]), q = _mm512_castps_pd(b[i + 1]), r = _mm512_castps_pd(b[i + 2]),
                  s = _mm512_castps_pd(b[i + 3]);
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, r)), a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, r));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(q, s)), a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(q, s));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 lo01 = _mm512_shuffle_f32x4(a[j], a[j + 4], 0x44), hi01 = _mm512_shuffle_f32x4(a[j], a[j + 4], 0xEE);
    const __m512 lo23 = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0x44),
                 hi23 = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0xEE);
    _mm512_storeu_ps(out + j * kPanel, _mm512_shuffle_f32x4(lo01, lo23, 0x88));
    _mm512_storeu_ps(out + (4 + j) * kPanel, _mm512_shuffle_f32x4(lo01, lo23, 0xDD));
    _mm512_storeu_ps(out + (8 + j) * kPanel, _mm512_shuffle_f32x4(hi01, hi23, 0x88));
    _mm512_storeu_ps(out + (12 + j) * kPanel, _mm512_shuffle_f32x4(hi01, hi23, 0xDD));
  }
}
#endif

// A panel of Q^T: out[c * kPanel + r] = in[r * cells + c] for kPanel rows.
inline void transpose_panel(const float* in, int64_t cells, float* out) {
  int64_t c = 0;
#if defined(UNMASK_AVX512)
  for (; c + kW <= cells; c += kW)
    for (int r = 0; r < kPanel; r += kW) transpose_cells(in + r * cells + c, cells, out + c * kPanel + r);
#endif
  for (; c < cells; ++c)
    for (int r = 0; r < kPanel; ++r) out[c * kPanel + r] = in[r * cells + c];
}

#if defined(UNMASK_ISA_IS_AVX512BF16)
// n <= 32 columns of two V rows (null: zeros), paired along keys: cells [16 from unpacklo][16 from unpackhi].
UNMASK_INLINE void pair_rows(const bf16* x, const bf16* y, int64_t stride, int n, float* out) {
  uint16_t tx[32] = {0}, ty[32] = {0};
  const void *px = tx, *py = ty;
  if (stride == 1 && n == 32) {
    if (x != nullptr) px = x;
    if (y != nullptr) py = y;
  } else {
    for (int d = 0; d < n; ++d) {
      if (x != nullptr) tx[d] = x[d * stride].bits;
      if (y != nullptr) ty[d] = y[d * stride].bits;
    }
  }
  const __m512i a = _mm512_loadu_si512(px), b = _mm512_loadu_si512(py);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi16(a, b));
  _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi16(a, b));
}
#endif

// Elements d .. d + kW - 1 of an output row that lies in `order`.
template <Order order>
UNMASK_INLINE vf output_in_order(const float* o, int64_t d) {
  if constexpr (order == kNatural) {
    return vload(o + d);
  } else {
    const float* chunk = o + d / kPanel * kPanel;
    const bool second = d % kPanel != 0;
#if defined(UNMASK_AVX512)
    const __m512i even_odd = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i unpack = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i index = _mm512_add_epi32(order == kEvenOdd ? even_odd : unpack, _mm512_set1_epi32(second ? 8 : 0));
    return {_mm512_permutex2var_ps(_mm512_loadu_ps(chunk), index, _mm512_loadu_ps(chunk + kW))};
#else
    float t[kW];  // kEvenOdd only
    for (int i = 0; i < kW; ++i) t[i] = chunk[i % 2 * kW + i / 2 + (second ? kW / 2 : 0)];
    return vload(t);
#endif
  }
}

// Whether any of n elements is not finite: 0 * x is NaN exactly then.
template <class T>
inline bool any_nonfinite(const T* x, int64_t stride, int64_t n) {
  float sum = 0.0f;
  int64_t d = 0;
  if (stride == 1 && n >= kW) {
    vf s = vset(0.0f);
    for (; d + kW <= n; d += kW) s = vadd(s, vmul(vload(x + d), vset(0.0f)));
    sum = vreduce_add(s);
  }
  for (; d < n; ++d) sum += to_float(x[d * stride]) * 0.0f;
  return sum != 0.0f;  // NaN
}

}  // namespace
}  // namespace unmask::cpu::UNMASK_ISA_NS
