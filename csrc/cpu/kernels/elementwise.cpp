// rms_norm / add_rms_norm:  residual += x (rounded to dtype);  y = round(x / sqrt(mean x^2 + eps)) * weight
// silu_mul:                 y = round(gate / (1 + exp(-gate))) * up, gate_up = [gate | up] per row
// add_rows:                 y += x (rounded to dtype), biases and shared experts of decoder_layer and moe_experts
//
// Layout: rows of dense elements. Bytes: norm reads and writes each element once from memory (a row of 8,192 bf16 stays in L1
// between its two passes; the residual form moves 4 streams), silu_mul reads 2F and writes F. FLOPs: ~4 and ~25 per element, so both
// run at memory speed once the data leaves the caches. Work split: rows; nothing depends on how many rows a call has.
#include "cpu/elementwise_kernels.h"
#include "cpu/elementwise_rows.h"

namespace unmask::cpu::UNMASK_ISA_NS {
namespace {

template <class T>
UNMASK_INLINE void add_row(T* r, const T* x, int64_t n) {
  int64_t i = 0;
  for (; i + kW <= n; i += kW) vstore(r + i, vadd(vload(r + i), vload(x + i)));
  if (i < n) {
    const int m = static_cast<int>(n - i);
    vstore_n(r + i, vadd(vload_n(r + i, m, 0.0f), vload_n(x + i, m, 0.0f)), m);
  }
}

template <class T>
void norm_rows(const NormParams& p, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t n = p.dim;
  for (int64_t t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(p.x) + t * p.x_row;
    if (p.residual != nullptr) {
      T* r = static_cast<T*>(p.residual) + t * p.residual_row;
      add_row(r, x, n);
      x = r;
    }
    T* out = static_cast<T*>(p.out) + t * n;
    const vf scale = vset(inverse_rms(x, n, p.eps));
    int64_t i = 0;
    for (; i + kW <= n; i += kW) vstore(out + i, normed<T>(vload(x + i), vload(weight + i), scale));
    if (i < n) {
      const int m = static_cast<int>(n - i);
      vstore_n(out + i, normed<T>(vload_n(x + i, m, 0.0f), vload_n(weight + i, m, 0.0f), scale), m);
    }
  }
}

// exp(-|x|) = 2^k * exp(r), |r| <= ln2 / 2, Taylor to r^7 (error 5e-9). Below -87.3, where 2^k would leave the normal range, 0.
// NaN stays NaN: the maximum returns its second operand then.
UNMASK_INLINE vf exp_minus_abs(vf x) {
  const vf a = vmin(x, vsub(vset(0.0f), x));
  const vf y = vmax(vset(-87.3f), a);
  const vf magic = vset(0x1.8p23f);
  const vf t = vfma(y, vset(0x1.715476p+0f), magic);  // log2(e); the low bits of t hold k
  const vf k = vsub(t, magic);
  vf r = vfma(k, vset(-0x1.62e4p-1f), y);  // ln2 = 0x1.62e4p-1 + 0x1.7f7d1cf7p-20: the first product is exact
  r = vfma(k, vset(-0x1.7f7d1cp-20f), r);
  vf e = vset(1.0f / 5040.0f);
  e = vfma(e, r, vset(1.0f / 720.0f));
  e = vfma(e, r, vset(1.0f / 120.0f));
  e = vfma(e, r, vset(1.0f / 24.0f));
  e = vfma(e, r, vset(1.0f / 6.0f));
  e = vfma(e, r, vset(0.5f));
  e = vfma(e, r, vset(1.0f));
  e = vfma(e, r, vset(1.0f));
#if defined(UNMASK_AVX512)
  const __m512i bits = _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(t.v), 23), _mm512_set1_epi32(127 << 23));
  const __mmask16 tiny = _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(-87.3f), _CMP_LT_OQ);
  return {_mm512_mask_blend_ps(tiny, _mm512_mul_ps(e.v, _mm512_castsi512_ps(bits)), _mm512_setzero_ps())};
#elif defined(UNMASK_AVX2)
  const __m256i bits = _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(t.v), 23), _mm256_set1_epi32(127 << 23));
  const __m256 tiny = _mm256_cmp_ps(a.v, _mm256_set1_ps(-87.3f), _CMP_LT_OQ);
  return {_mm256_andnot_ps(tiny, _mm256_mul_ps(e.v, _mm256_castsi256_ps(bits)))};
#else
  for (int i = 0; i < kW; ++i) {
    const float scale = bits_to_float((float_to_bits(t.v[i]) << 23) + (127u << 23));
    e.v[i] = a.v[i] < -87.3f ? 0.0f : e.v[i] * scale;
  }
  return e;
#endif
}

// x * sigmoid(x) from e = exp(-|x|) <= 1, which cannot overflow: x / (1 + e) for x >= 0, x e / (1 + e) below.
UNMASK_INLINE vf silu(vf x) {
  const vf e = exp_minus_abs(x);
  const vf one = vset(1.0f);
#if defined(UNMASK_AVX512)
  const __mmask16 below = _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_LT_OQ);
  const vf top = {_mm512_mask_mul_ps(x.v, below, x.v, e.v)};
#elif defined(UNMASK_AVX2)
  const vf top = {_mm256_blendv_ps(x.v, _mm256_mul_ps(x.v, e.v), _mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_LT_OQ))};
#else
  vf top = x;
  for (int i = 0; i < kW; ++i) top.v[i] = x.v[i] < 0.0f ? x.v[i] * e.v[i] : x.v[i];
#endif
  return vdiv(top, vadd(one, e));
}

template <class T>
void silu_rows(const SiluParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.width;
  const T* const kind = nullptr;
  for (int64_t t = begin; t < end; ++t) {
    const T* gate = static_cast<const T*>(p.gate_up) + t * p.row;
    const T* up = gate + n;
    T* out = static_cast<T*>(p.out) + t * n;
    int64_t i = 0;
    for (; i + kW <= n; i += kW) vstore(out + i, vmul(vround(silu(vload(gate + i)), kind), vload(up + i)));
    if (i < n) {
      const int m = static_cast<int>(n - i);
      vstore_n(out + i, vmul(vround(silu(vload_n(gate + i, m, 0.0f)), kind), vload_n(up + i, m, 0.0f)), m);
    }
  }
}

template <class T>
void sum_rows(const AddParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t)
    add_row(static_cast<T*>(p.y) + t * p.y_row, static_cast<const T*>(p.x) + t * p.x_row, p.width);
}

}  // namespace

void rms_norm_rows(const NormParams& p, int64_t begin, int64_t end) {
  if (p.dtype == 0) norm_rows<float>(p, begin, end);
  else if (p.dtype == 1) norm_rows<bf16>(p, begin, end);
  else norm_rows<fp16>(p, begin, end);
}

void silu_mul_rows(const SiluParams& p, int64_t begin, int64_t end) {
  if (p.dtype == 0) silu_rows<float>(p, begin, end);
  else if (p.dtype == 1) silu_rows<bf16>(p, begin, end);
  else silu_rows<fp16>(p, begin, end);
}

void add_rows(const AddParams& p, int64_t begin, int64_t end) {
  if (p.dtype == 0) sum_rows<float>(p, begin, end);
  else if (p.dtype == 1) sum_rows<bf16>(p, begin, end);
  else sum_rows<fp16>(p, begin, end);
}

}  // namespace unmask::cpu::UNMASK_ISA_NS
