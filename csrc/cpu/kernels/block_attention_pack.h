// Bringing Q, K and V into the cells of block_attention_micro.h: widening, pairing, gathering through segments and odd strides.
#pragma once
#include "cpu/kernels/block_attention_micro.h"

namespace unmask::cpu::UNMASK_ISA_NS {
namespace {

UNMASK_INLINE float bits_cell(uint32_t u) { return bits_to_float(u); }

// One row of D elements as cells: D floats, or D / 2 pairs.
template <class E, class T>
UNMASK_INLINE void pack_row(const T* x, int64_t stride, int64_t dim, float* out) {
  if constexpr (E::kDot) {
    for (int64_t d = 0; d < dim; d += 2)
      out[d / 2] = bits_cell(x[d * stride].bits | static_cast<uint32_t>(x[(d + 1) * stride].bits) << 16);
  } else {
    int64_t d = 0;
    if (stride == 1)
      for (; d + kW <= dim; d += kW) vstore(out + d, vload(x + d));
    for (; d < dim; ++d) out[d] = to_float(x[d * stride]);
  }
}

// Column `lane` of a Q^T panel: out[c * kPanel] = cell c of the row, floats scaled (bf16 pairs cannot be: their scores are).
template <class E, class T>
inline void pack_query(const T* x, int64_t stride, int64_t dim, float scale, float* out) {
  if constexpr (E::kDot) {
    for (int64_t d = 0; d < dim; d += 2)
      out[d / 2 * kPanel] = bits_cell(x[d * stride].bits | static_cast<uint32_t>(x[(d + 1) * stride].bits) << 16);
  } else {
    for (int64_t d = 0; d < dim; ++d) out[d * kPanel] = to_float(x[d * stride]) * scale;
  }
}

// Columns [d0, d0 + n) of one V row as floats; the rest of `width` is zero. A null row is all zeros.
template <class T>
UNMASK_INLINE void widen(const T* x, int64_t stride, int n, int width, float* out) {
  int d = 0;
  if (x != nullptr) {
    if (stride == 1)
      for (; d + kW <= n; d += kW) vstore(out + d, vload(x + d));
    for (; d < n; ++d) out[d] = to_float(x[d * stride]);
  }
  for (; d < width; ++d) out[d] = 0.0f;
}

#if defined(UNMASK_ISA_IS_AVX512BF16)
// 32 columns of two V rows, paired along keys: cells [16 from unpacklo][16 from unpackhi], which is the d order
// {8l + e} then {8l + 4 + e}, l = 0..3, e = 0..3. The accumulators keep that order; output_in_order undoes it.
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

// Vector d / kW of an output row, in the order of d.
template <class E>
UNMASK_INLINE vf output_in_order(const float* o, int64_t d) {
#if defined(UNMASK_ISA_IS_AVX512BF16)
  if constexpr (E::kDot) {
    const int64_t base = d / 32 * 32;
    const __m512 lo = _mm512_loadu_ps(o + base), hi = _mm512_loadu_ps(o + base + 16);
    const int s = d % 32 ? 8 : 0;
    const __m512i index = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23), _mm512_set1_epi32(s));
    return {_mm512_permutex2var_ps(lo, index, hi)};
  }
#endif
  return vload(o + d);
}

// Whether any of n elements is not finite.
template <class T>
inline bool any_nonfinite(const T* x, int64_t stride, int64_t n) {
  float sum = 0.0f;  // 0 * x is NaN exactly when x is not finite
  int64_t d = 0;
  if (stride == 1 && n >= kW) {
    vf s = vset(0.0f);
    for (; d + kW <= n; d += kW) s = vadd(s, vmul(vload(x + d), vset(0.0f)));
    sum = vreduce_add(s);
  }
  for (; d < n; ++d) sum += to_float(x[d * stride]) * 0.0f;
  return sum != 0.0f;  // NaN != 0
}

}  // namespace
}  // namespace unmask::cpu::UNMASK_ISA_NS
