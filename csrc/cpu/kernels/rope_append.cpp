// rope_append: per token t and head h, with angle_i = float(pos) * inv_freq[i] (fp32), c = cos, s = sin of it,
//   x  = weight ? round(x / sqrt(mean x^2 + eps)) * weight : x                         (rounded to the dtype)
//   out[i] = x[i] c_i - x[i + F] s_i,  out[i + F] = x[i + F] c_i + x[i] s_i,  i < F    (rotate_half; fp32, rounded once)
//   out[j] = x[j], j >= 2F;  K goes to k_cache[row, h, slot], V is copied to v_cache[row, h, v_slot].
//
// Layout: q [T, Hq, D], k and v [T, Hkv, D], caches [R, Hkv, S, D], any strides; rows of D elements are streamed when dense and
// gathered through scratch otherwise. Bytes: each of q, k, v read once and written once, 2 (Hq + 2 Hkv) D elements per token.
// FLOPs: 3 per rotated element, plus ~25 double operations per angle, once per token: memory-bound. Work split: tokens.
#include <stddef.h>

#include "common/rope_angle.h"
#include "cpu/elementwise_rows.h"
#include "cpu/rope_append_kernels.h"

namespace unmask::cpu::UNMASK_ISA_NS {
namespace {

// cos and sin of position * inv_freq[i], the product rounded to fp32 as the model's authors do.
UNMASK_INLINE void cos_sin(float position, const float* inv_freq, int64_t n, float* cos_out, float* sin_out) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float angle = position * inv_freq[i];
    const uint32_t magnitude = float_to_bits(angle) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
    const CosSin x = cos_sin_below_huge(angle);
    sin_out[i] = x.s;
    cos_out[i] = x.c;
  }
  if (largest < kHugeAngle) return;
  for (int64_t i = 0; i < n; ++i) {
    const double a = static_cast<double>(position * inv_freq[i]);
    sin_out[i] = static_cast<float>(__builtin_sin(a));
    cos_out[i] = static_cast<float>(__builtin_cos(a));
  }
}

template <class T>
UNMASK_INLINE void rotate_pair(vf a, vf b, const float* c, const float* s, vf* first, vf* second) {
  const vf cv = vload(c), sv = vload(s);
  *first = vsub(vmul(a, cv), vmul(b, sv));
  *second = vadd(vmul(b, cv), vmul(a, sv));
}

// One head, dense rows. kNorm: x is normalised and weighted on the way in, both roundings of the dtype included.
template <class T, bool kNorm>
UNMASK_INLINE void rotate_head(const T* x, T* out, const T* weight, float eps, const float* c, const float* s,
                               int64_t freqs, int64_t dim) {
  const T* const kind = nullptr;
  const vf scale = vset(kNorm ? inverse_rms(x, dim, eps) : 1.0f);
  const auto load = [&](int64_t i) __attribute__((always_inline)) {
    const vf v = vload(x + i);
    return kNorm ? vround(normed<T>(v, vload(weight + i), scale), kind) : v;
  };
  const auto load_n = [&](int64_t i, int n) __attribute__((always_inline)) {
    const vf v = vload_n(x + i, n, 0.0f);
    return kNorm ? vround(normed<T>(v, vload_n(weight + i, n, 0.0f), scale), kind) : v;
  };
  vf first, second;
  int64_t i = 0;
  for (; i + kW <= freqs; i += kW) {
    rotate_pair<T>(load(i), load(freqs + i), c + i, s + i, &first, &second);
    vstore(out + i, first);
    vstore(out + freqs + i, second);
  }
  if (i < freqs) {
    const int n = static_cast<int>(freqs - i);
    float cn[kW], sn[kW];
    vstore(cn, vload_n(c + i, n, 0.0f));
    vstore(sn, vload_n(s + i, n, 0.0f));
    rotate_pair<T>(load_n(i, n), load_n(freqs + i, n), cn, sn, &first, &second);
    vstore_n(out + i, first, n);
    vstore_n(out + freqs + i, second, n);
  }
  i = 2 * freqs;
  if (!kNorm) {
    if (i < dim) __builtin_memcpy(out + i, x + i, static_cast<size_t>(dim - i) * sizeof(T));
    return;
  }
  for (; i + kW <= dim; i += kW) vstore(out + i, load(i));
  if (i < dim) {
    const int n = static_cast<int>(dim - i);
    vstore_n(out + i, load_n(i, n), n);
  }
}

// A row of D elements as a dense one: itself, or a copy in `buffer`.
template <class T>
UNMASK_INLINE const T* gathered(const T* x, int64_t stride, int64_t dim, T* buffer) {
  if (stride == 1) return x;
  for (int64_t i = 0; i < dim; ++i) buffer[i] = x[i * stride];
  return buffer;
}

template <class T>
UNMASK_INLINE void scatter(const T* x, T* out, int64_t stride, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) out[i * stride] = x[i];
}

template <class T>
UNMASK_INLINE void rotate_any(const RopeParams& p, const T* x, const T* weight, const float* c, const float* s,
                              T* out) {
  if (weight != nullptr) rotate_head<T, true>(x, out, weight, p.eps, c, s, p.freqs, p.dim);
  else rotate_head<T, false>(x, out, weight, p.eps, c, s, p.freqs, p.dim);
}

template <class T>
void tokens(const RopeParams& p, int64_t begin, int64_t end, float* scratch) {
  float* const c = scratch;
  float* const s = c + p.freqs;
  T* const in_row = reinterpret_cast<T*>(s + p.freqs);
  T* const out_row = reinterpret_cast<T*>(s + p.freqs + p.dim);
  const int64_t dim = p.dim;
  for (int64_t t = begin; t < end; ++t) {
    T* out = static_cast<T*>(p.out) + t * p.q_heads * dim;
    const RopeTarget at = rope_target(p, t);
    const int64_t row = at.row, slot = at.slot, v_slot = at.v_slot;
    if (!at.live()) {
      __builtin_memset(out, 0, static_cast<size_t>(p.q_heads * dim) * sizeof(T));
      if (at.fault != 0 && p.status != nullptr) p.status[t * p.status_stride] |= at.fault;
      continue;
    }
    cos_sin(static_cast<float>(at.pos), p.inv_freq, p.freqs, c, s);
    const T* q = static_cast<const T*>(p.q) + t * p.q_stride[0];
    for (int64_t h = 0; h < p.q_heads; ++h, out += dim) {
      const T* x = gathered(q + h * p.q_stride[1], p.q_stride[2], dim, in_row);
      rotate_any(p, x, static_cast<const T*>(p.q_weight), c, s, out);
    }
    if (slot >= 0 && (p.k_lost == nullptr || p.k_lost[t] == 0)) {
      const T* k = static_cast<const T*>(p.k) + t * p.k_stride[0];
      const int64_t* cs = p.k_cache_stride;
      T* cache = static_cast<T*>(p.k_cache) + row * cs[0] + slot * cs[2];
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        const T* x = gathered(k + h * p.k_stride[1], p.k_stride[2], dim, in_row);
        T* const to = cs[3] == 1 ? cache + h * cs[1] : out_row;
        rotate_any(p, x, static_cast<const T*>(p.k_weight), c, s, to);
        if (cs[3] != 1) scatter(out_row, cache + h * cs[1], cs[3], dim);
      }
    }
    if (v_slot >= 0 && (p.v_lost == nullptr || p.v_lost[t] == 0)) {
      const T* v = static_cast<const T*>(p.v) + t * p.v_stride[0];
      const int64_t* cs = p.v_cache_stride;
      T* cache = static_cast<T*>(p.v_cache) + row * cs[0] + v_slot * cs[2];
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        const T* x = gathered(v + h * p.v_stride[1], p.v_stride[2], dim, in_row);
        if (cs[3] == 1) __builtin_memcpy(cache + h * cs[1], x, static_cast<size_t>(dim) * sizeof(T));
        else scatter(x, cache + h * cs[1], cs[3], dim);
      }
    }
  }
}

}  // namespace

void rope_append_tokens(const RopeParams& p, int64_t begin, int64_t end, float* scratch) {
  if (p.dtype == 0) tokens<float>(p, begin, end, scratch);
  else if (p.dtype == 1) tokens<bf16>(p, begin, end, scratch);
  else tokens<fp16>(p, begin, end, scratch);
}

}  // namespace unmask::cpu::UNMASK_ISA_NS
