// fp32 exp and log with a fixed order of fused operations, and the Gumbel noise of the sampling ops. One header for
// the CPU (every ISA) and CUDA: no libm, no contraction, fma only where written, so equal inputs give equal bits
// everywhere.
//
//   exp_neg(d), d <= 0      2^n (1 + r Q(r)), d log2(e) = n + r, |r| <= 1/2; Q: degree 4; |rel error| < 2e-7 (|d| < 10)
//   log_positive(x)         k ln2 + log1p(f), x = 2^k (1 + f), 1 + f in [sqrt(1/2), sqrt(2));
//                           log1p(f) = f + f^2 (f P(f) - 1/2), P: degree 7
//   gumbel_from_bits(w)     -log(E), E = -log(1 - v) an Exp(1) variate, v = (w + 1/2) / 2^32
// The coefficients are our own weighted minimax fits (Lawson iteration), rounded to fp32. Branch-free, so that loops
// over lanes vectorise.
//
// Both tails of E keep full relative precision: for w < 2^31 log(1 - v) is taken as log1p(-v), where -v (or 1 - 2v for
// v > 1 - sqrt(1/2), with k = -1) is exact; for w >= 2^31 the small number is 1 - v = (~w + 1/2) / 2^32 and enters log
// directly. g lies in [-3.13, 22.88].
#pragma once
#include <cstdint>

#include "common/philox.h"

#if !defined(__CUDA_ARCH__)
#define UNMASK_FMA(a, b, c) __builtin_fmaf((a), (b), (c))
#else
#define UNMASK_FMA(a, b, c) __fmaf_rn((a), (b), (c))
#endif

namespace unmask {

constexpr float kLog2e = 0x1.715476p+0f;
constexpr float kLn2Hi = 0x1.62e400p-1f;  // 14 bits: k * kLn2Hi is exact
constexpr float kLn2Lo = 0x1.7f7d1cp-20f;
constexpr float kExpMin = -88.0f;  // exp_neg below it is 0
constexpr float kRoundMagic = 0x1.8p23f + 127.0f;  // y + magic rounds y to n; its low bits are then n + 127
constexpr float kExpC1 = 0x1.62e42ap-1f, kExpC2 = 0x1.ebf9bcp-3f, kExpC3 = 0x1.c6b752p-5f, kExpC4 = 0x1.3cea88p-7f,
                kExpC5 = 0x1.5bba14p-10f;
constexpr float kLogP0 = 0x1.555554p-2f, kLogP1 = -0x1.000226p-2f, kLogP2 = 0x1.99a008p-3f, kLogP3 = -0x1.547244p-3f,
                kLogP4 = 0x1.22da1cp-3f, kLogP5 = -0x1.0d8542p-3f, kLogP6 = 0x1.055b6ap-3f, kLogP7 = -0x1.38b580p-4f;
constexpr float kGumbelMax = 22.9f;  // above every value of gumbel_from_bits

UNMASK_HD float float_of_bits(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
#endif
}
UNMASK_HD uint32_t bits_of_float(float f) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(f);
#else
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
#endif
}
UNMASK_HD double double_of_bits(uint64_t u) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(static_cast<long long>(u));
#else
  double d;
  __builtin_memcpy(&d, &u, 8);
  return d;
#endif
}
UNMASK_HD uint64_t bits_of_double(double d) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint64_t>(__double_as_longlong(d));
#else
  uint64_t u;
  __builtin_memcpy(&u, &d, 8);
  return u;
#endif
}

// e^d for d <= 0 (-inf gives 0, exp_neg(0) is exactly 1, NaN stays NaN). n = -127 has scale 0, so the result
// underflows to 0, not to a subnormal.
UNMASK_HD float exp_neg(float d) {
  d = kExpMin > d ? kExpMin : d;  // keeps a NaN
  const float z = UNMASK_FMA(d, kLog2e, kRoundMagic);
  const float r = UNMASK_FMA(d, kLog2e, kRoundMagic - z);
  float q = UNMASK_FMA(kExpC5, r, kExpC4);
  q = UNMASK_FMA(q, r, kExpC3);
  q = UNMASK_FMA(q, r, kExpC2);
  q = UNMASK_FMA(q, r, kExpC1);
  return UNMASK_FMA(q, r, 1.0f) * float_of_bits(bits_of_float(z) << 23);
}

// k ln2 + log1p(f) for f in [sqrt(1/2) - 1, sqrt(2) - 1], k an integer
UNMASK_HD float log_reduced(float f, float k) {
  float p = UNMASK_FMA(kLogP7, f, kLogP6);
  p = UNMASK_FMA(p, f, kLogP5);
  p = UNMASK_FMA(p, f, kLogP4);
  p = UNMASK_FMA(p, f, kLogP3);
  p = UNMASK_FMA(p, f, kLogP2);
  p = UNMASK_FMA(p, f, kLogP1);
  p = UNMASK_FMA(p, f, kLogP0);
  const float h = UNMASK_FMA(p, f, -0.5f);
  return UNMASK_FMA(k, kLn2Hi, UNMASK_FMA(f * f, h, UNMASK_FMA(k, kLn2Lo, f)));
}

// ln x for normal positive finite x
UNMASK_HD float log_positive(float x) {
  const int32_t i = static_cast<int32_t>(bits_of_float(x)) - 0x3F3504F3;  // 0x3F3504F3: sqrt(1/2)
  const float m = float_of_bits(static_cast<uint32_t>((i & 0x007FFFFF) + 0x3F3504F3));
  return log_reduced(m - 1.0f, static_cast<float>(i >> 23));
}

// Exp(1) variate of 32 random bits, in [2^-33, 22.88]
UNMASK_HD float exponential_from_bits(uint32_t w) {
  const bool low = w < 0x80000000u;
  const float h =
      (static_cast<float>(static_cast<int32_t>(low ? w : ~w)) + 0.5f) * 0x1p-32f;  // v, or 1 - v; in (0, 1/2]
  const int32_t i = static_cast<int32_t>(bits_of_float(h)) - 0x3F3504F3;
  const float m = float_of_bits(static_cast<uint32_t>((i & 0x007FFFFF) + 0x3F3504F3));
  const bool half = h > 0x1.2bec34p-2f;  // v > 1 - sqrt(1/2): 1 - v = (1 + (1 - 2v)) / 2
  const float f = low ? (half ? 1.0f - 2.0f * h : -h) : m - 1.0f;
  const float k = low ? (half ? -1.0f : 0.0f) : static_cast<float>(i >> 23);
  return -log_reduced(f, k);
}

// Standard Gumbel variate of 32 random bits
UNMASK_HD float gumbel_from_bits(uint32_t w) { return -log_positive(exponential_from_bits(w)); }

UNMASK_HD uint32_t philox_word(const Philox4& r, uint32_t i) {
  return i == 0 ? r.x : i == 1 ? r.y : i == 2 ? r.z : r.w;
}

// The noise of token `id` for one (seed, step, pos): word id % 4 of philox(seed; id / 4, pos, step, 0).
UNMASK_HD float gumbel_of_id(uint64_t seed, uint32_t step, uint32_t pos, uint32_t id) {
  return gumbel_from_bits(philox_word(philox(seed, id >> 2, pos, step, 0u), id & 3u));
}

// What sampling compares: temperature x noise + logit, one rounding.
UNMASK_HD float noisy_score(float temperature, float g, float x) { return UNMASK_FMA(temperature, g, x); }

}  // namespace unmask
