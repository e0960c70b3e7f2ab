// A float vector of the ISA that the including kernel file is compiled for: 16 lanes (AVX-512), 8 (AVX2) or 4 (portable).
// Only what the kernels need. Loads widen bf16 and fp16 to fp32; `n` variants touch n < kW elements and fill the rest.
// vshl23: bits << 23 (2^n from a rounded sum); vbits_value: float(int32 bits); vload_half: float(w >> 1) of 32-bit words; vgt/vge_mask:
// one bit per lane, false on NaN. vmax/vmin return the second operand if either is NaN.
// fma() is one rounding on every ISA. No C++ standard library here (see csrc/cmake/Isa.cmake).
#pragma once
#include <stdint.h>

#if defined(UNMASK_ISA_IS_AVX2) || defined(UNMASK_ISA_IS_AVX512) || defined(UNMASK_ISA_IS_AVX512BF16)
#include <immintrin.h>
#endif

#if defined(UNMASK_ISA_IS_AVX512) || defined(UNMASK_ISA_IS_AVX512BF16)
#define UNMASK_AVX512 1
#elif defined(UNMASK_ISA_IS_AVX2)
#define UNMASK_AVX2 1
#else
#define UNMASK_PORTABLE 1
#endif

#define UNMASK_INLINE static inline __attribute__((always_inline))

namespace unmask::cpu::UNMASK_ISA_NS {

// Storage types; only conversions are defined on them.
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

UNMASK_INLINE float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
UNMASK_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

UNMASK_INLINE float to_float(float x) { return x; }
UNMASK_INLINE float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
UNMASK_INLINE float to_float(fp16 x) {
#if defined(UNMASK_PORTABLE)
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, mant = x.bits & 0x3FFu,
                 exp = (x.bits >> 10) & 0x1Fu;
  if (exp == 0x1Fu) return bits_to_float(sign | 0x7F800000u | (mant << 13));
  if (exp != 0) return bits_to_float(sign | ((exp + 112u) << 23) | (mant << 13));
  const float sub = static_cast<float>(mant) * 0x1p-24f;  // subnormal or zero: exact
  return bits_to_float(sign | float_to_bits(sub));
#else
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits)));
#endif
}

UNMASK_INLINE void from_float(float x, float* o) { *o = x; }
UNMASK_INLINE void from_float(float x, bf16* o) {  // round to nearest even; NaN stays NaN
  const uint32_t u = float_to_bits(x);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) {
    o->bits = static_cast<uint16_t>((u >> 16) | 0x40u);
    return;
  }
  o->bits = static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}
UNMASK_INLINE void from_float(float x, fp16* o) {
#if defined(UNMASK_PORTABLE)
  const uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000u, a = u & 0x7FFFFFFFu;
  if (a > 0x7F800000u) {
    o->bits = static_cast<uint16_t>(sign | 0x7E00u);
    return;
  }
  if (a >= 0x477FF000u) {
    o->bits = static_cast<uint16_t>(sign | 0x7C00u);
    return;
  }  // rounds to infinity
  if (a < 0x38800000u) {  // subnormal: let the FPU round at 2^-24
    const float r = bits_to_float(a) + 0.5f;  // 0.5 has ulp 2^-24
    o->bits = static_cast<uint16_t>(sign | (float_to_bits(r) - 0x3F000000u));
    return;
  }
  const uint32_t r = a + 0xFFFu + ((a >> 13) & 1u) - 0x38000000u;
  o->bits = static_cast<uint16_t>(sign | (r >> 13));
#else
  o->bits = static_cast<uint16_t>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT), 0));
#endif
}

#if defined(UNMASK_AVX512)
constexpr int kW = 16;
struct vf { __m512 v; };
UNMASK_INLINE vf vset(float x) { return {_mm512_set1_ps(x)}; }
UNMASK_INLINE vf vload(const float* p) { return {_mm512_loadu_ps(p)}; }
UNMASK_INLINE vf vload(const bf16* p) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
}
UNMASK_INLINE vf vload(const fp16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
UNMASK_INLINE void vstore(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
UNMASK_INLINE vf vadd(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
UNMASK_INLINE vf vsub(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
UNMASK_INLINE vf vmul(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
UNMASK_INLINE vf vmax(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }  // second operand if either is NaN
UNMASK_INLINE vf vmin(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
UNMASK_INLINE vf vfma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
UNMASK_INLINE vf vdiv(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
UNMASK_INLINE float vreduce_max(vf a) { return _mm512_reduce_max_ps(a.v); }
UNMASK_INLINE float vreduce_add(vf a) { return _mm512_reduce_add_ps(a.v); }
UNMASK_INLINE vf vshl23(vf a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))}; }
UNMASK_INLINE vf vbits_value(vf a) { return {_mm512_cvtepi32_ps(_mm512_castps_si512(a.v))}; }
UNMASK_INLINE vf vload_half(const uint32_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_srli_epi32(_mm512_loadu_si512(p), 1))};
}
UNMASK_INLINE uint32_t vgt_mask(vf a, vf b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
// a + b where d is not 0 (a NaN is not), else a
UNMASK_INLINE vf vadd_where_nonzero(vf a, vf b, vf d) {
  return {_mm512_mask_add_ps(a.v, _mm512_cmp_ps_mask(d.v, _mm512_setzero_ps(), _CMP_NEQ_UQ), a.v, b.v)};
}
UNMASK_INLINE uint32_t vge_mask(vf a, vf b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
#elif defined(UNMASK_AVX2)
constexpr int kW = 8;
struct vf { __m256 v; };
UNMASK_INLINE vf vset(float x) { return {_mm256_set1_ps(x)}; }
UNMASK_INLINE vf vload(const float* p) { return {_mm256_loadu_ps(p)}; }
UNMASK_INLINE vf vload(const bf16* p) {
  return {_mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16))};
}
UNMASK_INLINE vf vload(const fp16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
UNMASK_INLINE void vstore(float* p, vf a) { _mm256_storeu_ps(p, a.v); }
UNMASK_INLINE vf vadd(vf a, vf b) { return {_mm256_add_ps(a.v, b.v)}; }
UNMASK_INLINE vf vsub(vf a, vf b) { return {_mm256_sub_ps(a.v, b.v)}; }
UNMASK_INLINE vf vmul(vf a, vf b) { return {_mm256_mul_ps(a.v, b.v)}; }
UNMASK_INLINE vf vmax(vf a, vf b) { return {_mm256_max_ps(a.v, b.v)}; }
UNMASK_INLINE vf vmin(vf a, vf b) { return {_mm256_min_ps(a.v, b.v)}; }
UNMASK_INLINE vf vfma(vf a, vf b, vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
UNMASK_INLINE vf vdiv(vf a, vf b) { return {_mm256_div_ps(a.v, b.v)}; }
UNMASK_INLINE float vreduce_max(vf a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
UNMASK_INLINE float vreduce_add(vf a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
UNMASK_INLINE vf vshl23(vf a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))}; }
UNMASK_INLINE vf vbits_value(vf a) { return {_mm256_cvtepi32_ps(_mm256_castps_si256(a.v))}; }
UNMASK_INLINE vf vload_half(const uint32_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 1))};
}
UNMASK_INLINE uint32_t vgt_mask(vf a, vf b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)); }
UNMASK_INLINE vf vadd_where_nonzero(vf a, vf b, vf d) {
  return {_mm256_add_ps(a.v, _mm256_and_ps(b.v, _mm256_cmp_ps(d.v, _mm256_setzero_ps(), _CMP_NEQ_UQ)))};
}
UNMASK_INLINE uint32_t vge_mask(vf a, vf b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)); }
#else
constexpr int kW = 4;
struct vf { float v[4]; };
#define UNMASK_LANES(expr)                     \
  vf r;                                        \
  for (int i = 0; i < 4; ++i) r.v[i] = (expr); \
  return r
UNMASK_INLINE vf vset(float x) { UNMASK_LANES(x); }
template <class T> UNMASK_INLINE vf vload(const T* p) { UNMASK_LANES(to_float(p[i])); }
UNMASK_INLINE void vstore(float* p, vf a) {
  for (int i = 0; i < 4; ++i) p[i] = a.v[i];
}
UNMASK_INLINE vf vadd(vf a, vf b) { UNMASK_LANES(a.v[i] + b.v[i]); }
UNMASK_INLINE vf vsub(vf a, vf b) { UNMASK_LANES(a.v[i] - b.v[i]); }
UNMASK_INLINE vf vmul(vf a, vf b) { UNMASK_LANES(a.v[i] * b.v[i]); }
UNMASK_INLINE vf vmax(vf a, vf b) { UNMASK_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
UNMASK_INLINE vf vmin(vf a, vf b) { UNMASK_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
UNMASK_INLINE vf vfma(vf a, vf b, vf c) { UNMASK_LANES(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
UNMASK_INLINE vf vdiv(vf a, vf b) { UNMASK_LANES(a.v[i] / b.v[i]); }
UNMASK_INLINE float vreduce_max(vf a) {
  const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2], y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return x > y ? x : y;
}
UNMASK_INLINE float vreduce_add(vf a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
UNMASK_INLINE vf vshl23(vf a) { UNMASK_LANES(bits_to_float(float_to_bits(a.v[i]) << 23)); }
UNMASK_INLINE vf vbits_value(vf a) { UNMASK_LANES(static_cast<float>(static_cast<int32_t>(float_to_bits(a.v[i])))); }
UNMASK_INLINE vf vload_half(const uint32_t* p) { UNMASK_LANES(static_cast<float>(static_cast<int32_t>(p[i] >> 1))); }
UNMASK_INLINE vf vadd_where_nonzero(vf a, vf b, vf d) { UNMASK_LANES(d.v[i] != 0.0f ? a.v[i] + b.v[i] : a.v[i]); }
UNMASK_INLINE uint32_t vgt_mask(vf a, vf b) {
  uint32_t m = 0;
  for (int i = 0; i < 4; ++i) m |= static_cast<uint32_t>(a.v[i] > b.v[i]) << i;
  return m;
}
UNMASK_INLINE uint32_t vge_mask(vf a, vf b) {
  uint32_t m = 0;
  for (int i = 0; i < 4; ++i) m |= static_cast<uint32_t>(a.v[i] >= b.v[i]) << i;
  return m;
}
#undef UNMASK_LANES
#endif

// fp32 -> bf16, round to nearest even, in integers: unlike vcvtneps2bf16 it keeps subnormals, so every ISA stores the same bits.
UNMASK_INLINE void vstore(bf16* p, vf a) {
#if defined(UNMASK_AVX512)
  const __m512i u = _mm512_castps_si512(a.v), top = _mm512_srli_epi32(u, 16);
  const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7FFF)), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, top, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
#elif defined(UNMASK_AVX2)
  const __m256i u = _mm256_castps_si256(a.v), top = _mm256_srli_epi32(u, 16);
  const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7FFF)), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_or_si256(top, _mm256_set1_epi32(0x40)), nan);
  r = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(r));
#else
  float t[kW];
  vstore(t, a);
  for (int i = 0; i < kW; ++i) from_float(t[i], p + i);
#endif
}
UNMASK_INLINE void vstore(fp16* p, vf a) {
#if defined(UNMASK_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(UNMASK_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
#else
  float t[kW];
  vstore(t, a);
  for (int i = 0; i < kW; ++i) from_float(t[i], p + i);
#endif
}
// First n < kW elements; the other lanes get `fill`.
template <class T> UNMASK_INLINE vf vload_n(const T* p, int n, float fill) {
  float t[kW];
  for (int i = 0; i < kW; ++i) t[i] = i < n ? to_float(p[i]) : fill;
  return vload(t);
}
// The first n < kW lanes.
template <class T> UNMASK_INLINE void vstore_n(T* p, vf a, int n) {
  float t[kW];
  vstore(t, a);
  for (int i = 0; i < n; ++i) from_float(t[i], p + i);
}
// What a store as T followed by a load gives: one rounding to T, still held as fp32.
UNMASK_INLINE vf vround(vf a, const float*) { return a; }
#if defined(UNMASK_AVX512)
UNMASK_INLINE vf vround(vf a, const bf16*) {
  const __m512i u = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_and_si512(_mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7FFF)),
                                     _mm512_set1_epi32(-65536));
  return {_mm512_mask_add_ps(_mm512_castsi512_ps(r), _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), a.v,
                             a.v)};  // NaN: quiet, as it was
}
UNMASK_INLINE vf vround(vf a, const fp16*) {
  return {_mm512_cvtph_ps(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT))};
}
#elif defined(UNMASK_AVX2)
UNMASK_INLINE vf vround(vf a, const bf16*) {
  const __m256i u = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_and_si256(_mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7FFF)),
                                     _mm256_set1_epi32(-65536));
  return {_mm256_blendv_ps(_mm256_castsi256_ps(r), a.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
}
UNMASK_INLINE vf vround(vf a, const fp16*) {
  return {_mm256_cvtph_ps(_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT))};
}
#else
template <class T> UNMASK_INLINE vf vround(vf a, const T*) {
  T t[kW];
  vstore(t, a);
  return vload(static_cast<const T*>(t));
}
#endif

}  // namespace unmask::cpu::UNMASK_ISA_NS
