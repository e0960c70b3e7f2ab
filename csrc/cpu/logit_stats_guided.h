// Guided logits z = u + w (c - u), rounded to the dtype of the logits after each of the three operations, as torch's eager code rounds: one
// chunk at a time into a dense buffer, which the passes of logit_stats_chunk.h then read from the cache. c - u, w x and u + y are three
// roundings on purpose: no fused multiply-add.
//
// bf16: 32 ids as two vectors, even ids and odd ids, and a rounding of three or four integer operations without a case for NaN. That a NaN stays one
// follows from where it comes from: its low 16 bits are zero, because it is the processor's default or the payload of a widened bf16, so
// adding at most 0x8000 carries nothing into the upper half. About 20 operations for 16 ids; the two passes behind take about 25.
#pragma once
#include "cpu/logit_stats_chunk.h"

namespace unmask::cpu::UNMASK_ISA_NS {

template <class T>
UNMASK_INLINE T guided(T c, T u, float w) {
  T d, y, z;
  from_float(to_float(c) - to_float(u), &d);
  from_float(w * to_float(d), &y);
  from_float(to_float(u) + to_float(y), &z);
  return z;
}

template <class T>
UNMASK_INLINE vf guided(vf c, vf u, vf w, const T* type) {  // before the last rounding
  return vadd(u, vround(vmul(w, vround(vsub(c, u), type)), type));
}

// kPair ids.
template <class T>
UNMASK_INLINE void guide_pair(const T* c, const T* u, vf w, T* out) {
  for (int i = 0; i < kPair; i += kW) vstore(out + i, guided(vload(c + i), vload(u + i), w, out));
}

#if defined(UNMASK_AVX512)
UNMASK_INLINE __m512i bf16_rounding(vf a) {  // the upper half is a in bf16
  const __m512i x = _mm512_castps_si512(a.v);
  const __m512i up = _mm512_add_epi32(x, _mm512_set1_epi32(0x7FFF));
  return _mm512_mask_add_epi32(up, _mm512_test_epi32_mask(x, _mm512_set1_epi32(0x10000)), up, _mm512_set1_epi32(1));
}
UNMASK_INLINE vf bf16_value(__m512i x) {
  return {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
}
UNMASK_INLINE __m512i guided_bf16(vf c, vf u, vf w) {
  const vf y = bf16_value(bf16_rounding(vmul(w, bf16_value(bf16_rounding(vsub(c, u))))));
  return bf16_rounding(vadd(u, y));
}
UNMASK_INLINE void guide_pair(const bf16* c, const bf16* u, vf w, bf16* out) {
  vf even_c, odd_c, even_u, odd_u;
  load_pair(c, &even_c, &odd_c);
  load_pair(u, &even_u, &odd_u);
  const __m512i even = _mm512_srli_epi32(guided_bf16(even_c, even_u, w), 16), odd = guided_bf16(odd_c, odd_u, w);
  _mm512_storeu_si512(out, _mm512_mask_blend_epi16(0xAAAAAAAAu, even, odd));
}
#elif defined(UNMASK_AVX2)
UNMASK_INLINE __m256i bf16_rounding(vf a) {  // the upper half is a in bf16
  const __m256i x = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(x, _mm256_set1_epi32(0x7FFF)), odd);
}
UNMASK_INLINE vf bf16_value(__m256i x) {
  return {_mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))))};
}
UNMASK_INLINE __m256i guided_bf16(vf c, vf u, vf w) {
  const vf y = bf16_value(bf16_rounding(vmul(w, bf16_value(bf16_rounding(vsub(c, u))))));
  return bf16_rounding(vadd(u, y));
}
UNMASK_INLINE void guide_pair(const bf16* c, const bf16* u, vf w, bf16* out) {
  vf even_c, odd_c, even_u, odd_u;
  load_pair(c, &even_c, &odd_c);
  load_pair(u, &even_u, &odd_u);
  const __m256i even = _mm256_srli_epi32(guided_bf16(even_c, even_u, w), 16), odd = guided_bf16(odd_c, odd_u, w);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_blend_epi16(even, odd, 0xAA));
}
#endif

// out[i] of the n ids of a chunk, dense.
template <class T>
void guide_chunk(const T* c, int64_t stride, const T* u, int64_t null_stride, int n, float w, T* out) {
  int i = 0;
  if (stride == 1 && null_stride == 1) {
    const vf weight = vset(w);
    for (; i + kPair <= n; i += kPair) guide_pair(c + i, u + i, weight, out + i);
  }
  for (; i < n; ++i) out[i] = guided(c[i * stride], u[i * null_stride], w);
}

}  // namespace unmask::cpu::UNMASK_ISA_NS
