// Routing of a mixture of experts: plain data, and the arithmetic that the CPU (every ISA) and CUDA share, so that both give the same bits.
//
//   score    sigmoid: 1 / (1 + e^-x);  softmax: e^(x - max) / sum.  Every e^ is computed in fp64 and rounded once to fp32; the other
//            operations are fp32, one rounding each, as torch's own sigmoid and softmax do them
//   sum      of a softmax: fp64 partial sums of every 32nd expert, halved from 16 apart down to 1, rounded once
//   order    by keys: unsigned integers in the order of the values, NaN above all, 0 below all ("cannot be chosen")
//   weight   score / (fp32(sum of the token's scores, fp64, in the order of choice) + 1e-20), times scale
#pragma once
#include <cstdint>

#include "common/noise.h"

namespace unmask {

constexpr int64_t kMaxExperts = 4096;
constexpr int kSoftmaxLanes = 32;

struct RouteParams {
  const float* logits;
  int64_t logits_stride[2];
  const int64_t* row;  // nullptr: every token is live
  int64_t row_stride;
  const float* bias;  // nullptr: none
  int64_t bias_stride;
  int64_t tokens, experts, groups, kept, top_k, multiple;
  int64_t capacity;  // entries of source
  bool softmax, renormalise;
  float scale;
  int64_t* expert;  // [tokens, top_k], dense, as the other outputs
  float* weight;
  int64_t* place;
  int64_t* source;  // [capacity]
  int32_t* offsets;  // [experts + 1]

  UNMASK_HD bool live(int64_t token) const { return row == nullptr || row[token * row_stride] >= 0; }
  UNMASK_HD float logit(int64_t token, int64_t e) const {
    return logits[token * logits_stride[0] + e * logits_stride[1]];
  }
  UNMASK_HD int64_t padded(int64_t rows) const { return (rows + multiple - 1) / multiple * multiple; }
};

struct CombineParams {
  const void* y;  // [rows, dim], dense rows
  int64_t y_row, rows, dim;
  int64_t dtype;  // 0 fp32, 1 bf16, 2 fp16
  const int64_t* place;  // [tokens, top_k]
  int64_t place_stride[2];
  const float* weight;
  int64_t weight_stride[2];
  int64_t tokens, top_k;
  void* out;  // [tokens, dim], dense
};

// e^x, right to 2^-45 before it is rounded to fp32: 2^n (Taylor to r^11), |r| <= ln2 / 2. No fused operation, so that it vectorises to the
// same bits on every ISA. Beyond +-110 the fp32 result is 0 or inf; NaN stays NaN.
UNMASK_HD float rounded_exp(float x) {
  constexpr double kMagic = 0x1.8p52;  // y + magic rounds y to n; its low bits are then n
  double v = x;
  v = v < -110.0 ? -110.0 : v;
  v = v > 110.0 ? 110.0 : v;
  const double t = v * 0x1.71547652b82fep+0 + kMagic;
  const double n = t - kMagic;
  const double r =
      (v - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;  // ln2 in two parts: the first product is exact
  double p = 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return static_cast<float>(p * double_of_bits((bits_of_double(t) + 1023u) << 52));
}

UNMASK_HD float sigmoid_score(float logit) { return 1.0f / (1.0f + rounded_exp(-logit)); }

// The choice keys.
constexpr uint32_t kNotChoosable = 0u, kNanKey = 0xFFFFFFFFu;
UNMASK_HD uint32_t choice_key(float v) {
  const uint32_t u = bits_of_float(v);
  const uint32_t key = (u & 0x80000000u) != 0 ? ~u : u | 0x80000000u;
  return (u & 0x7FFFFFFFu) > 0x7F800000u ? kNanKey : key;
}
UNMASK_HD float choice_of_key(uint32_t key) {
  return key == kNanKey ? float_of_bits(0x7FC00000u)
                        : float_of_bits((key & 0x80000000u) != 0 ? key & 0x7FFFFFFFu : ~key);
}

// A token's weights from its chosen scores, in place.
UNMASK_HD void finish_weights(const RouteParams& p, float* score) {
  float total = 1.0f;
  if (p.renormalise) {
    double sum = 0.0;
    for (int64_t j = 0; j < p.top_k; ++j) sum = sum + static_cast<double>(score[j]);
    total = static_cast<float>(sum) + 1e-20f;
  }
  for (int64_t j = 0; j < p.top_k; ++j) score[j] = (p.renormalise ? score[j] / total : score[j]) * p.scale;
}

}  // namespace unmask
