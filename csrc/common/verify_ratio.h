// verify_ratio: speculative sampling over packed spans, as plain data and arithmetic, one header for the CPU (every ISA) and CUDA.
//
//   p = softmax(p_logits[p_row] / T) over the ids that are not forbidden, q likewise
//   r = temper (ln q(token) - ln p(token)),   accepted  <=>  ln u < min(0, r)
//   at the first rejection   next = argmax over v of ln(q(v) - p(v))_+ + g(v),   of ln q(v) + g(v) if no id has q > p;  ties: lowest id
//
// Noise. Philox4x32-10 keyed by the position's (seed, step, pos), with a last counter word of its own for either use:
//   u = 1 - v, the first word of counter (0, pos, step, 2) as v = (w + 1/2) / 2^32; ln u = -exponential_from_bits(w)
//   g(id) = gumbel_from_bits(word id % 4 of counter (id / 4, pos, step, 3))
// 0 is the noise that logit_stats draws a token with and 1 is `uniform`: a draft drawn with the same key shares no bits with its verification.
//
// Sums are cut into chunks of kStatsChunk ids, as in filtered_stats, and merged in a fixed order. Masses q - p are fp32, with an error of some 1e-7 q.
#pragma once
#include <cstdint>

#include "common/filtered_stats.h"
#include "common/float_type.h"
#include "common/strided.h"

namespace unmask {

constexpr uint32_t kAcceptStream = 2, kResidualStream = 3;
constexpr float kSmallestNormal = 0x1p-126f;  // what log_positive takes; smaller masses count as 0

struct RatioSide {
  const void* logits;
  int64_t stride[2];  // row, column; elements
  int64_t n_rows;
  Strided<const int64_t> row;  // of each position
};

struct RatioInputs {
  RatioSide side[2];  // the draft's p, the target's q
  FloatType type;
  int64_t vocab, positions, spans;
  Strided<const int64_t> token, cu, seed, step, pos;
  Reals uniforms;  // data == nullptr: u comes from Philox
  double temper;
  float scale;  // 1 / temperature
  bool resample;
  int32_t list_status;  // kStatusBadId if an id to forbid is not below the vocabulary

  UNMASK_HD bool inactive(int64_t n) const { return side[0].row[n] == -1 || side[1].row[n] == -1; }
  UNMASK_HD int32_t entry_fault(int64_t n) const {
    int32_t bits = kStatusOk;
    for (int s = 0; s < 2; ++s)
      if (side[s].row[n] < 0 || side[s].row[n] >= side[s].n_rows) bits |= kStatusBadRow;
    if (token[n] < 0 || token[n] >= vocab) bits |= kStatusBadId;
    return bits;
  }
  // Its rows are read.
  UNMASK_HD bool readable(int64_t n) const { return !inactive(n) && entry_fault(n) == kStatusOk; }
  UNMASK_HD uint64_t seed_of(int64_t n) const { return static_cast<uint64_t>(seed[n]); }
  UNMASK_HD uint32_t step_of(int64_t n) const { return static_cast<uint32_t>(step[n]); }
  UNMASK_HD uint32_t pos_of(int64_t n) const { return static_cast<uint32_t>(pos[n]); }
};

struct RatioOutputs {
  int64_t *accepted, *next;  // [B]
  float* log_ratio;  // [N]
  int32_t* status;  // [B]
};

// ---- sums ---------------------------------------------------------------------------------------------------------
// r is NaN if a part's is (a merge alone may drop the smaller side whole).
UNMASK_HD SumExp merge_or_nan(const SumExp& a, const SumExp& b, float scale) {
  SumExp both = merge_tempered(a, b, scale);
  if (a.r != a.r || b.r != b.r) both.r = quiet_nan();
  return both;
}
UNMASK_HD SumExp merge_parts(const SumExp* parts, int64_t chunks, float scale) {
  SumExp all = empty_sum();
  for (int64_t c = 0; c < chunks; ++c) all = merge_or_nan(all, parts[c], scale);
  return all;
}

// ---- one position -------------------------------------------------------------------------------------------------
// ln of the softmax at logit x; -inf for x = -inf
UNMASK_HD double log_softmax(float x, const SumExp& sum, float scale) {
  if (x == neg_inf()) return static_cast<double>(x);
  const double d = x == sum.m ? 0.0 : static_cast<double>(x) - static_cast<double>(sum.m);
  return d * static_cast<double>(scale) - static_cast<double>(log_total(sum));
}

// Equal rows give exactly 0. An id that the draft cannot give but the target can: +inf; one that the target cannot give: -inf; so does what
// fp32 cannot hold.
UNMASK_HD float log_ratio_of(float x_p, const SumExp& p, float x_q, const SumExp& q, float scale, double temper) {
  const double log_q = log_softmax(x_q, q, scale), log_p = log_softmax(x_p, p, scale);
  const double none = static_cast<double>(neg_inf()), most = 0x1.fffffep+127;
  if (log_q == none) return neg_inf();
  const double r = temper * (log_q - log_p);
  return r > most ? pos_inf() : r < -most ? neg_inf() : static_cast<float>(r);
}

// A recorded uniform in [0, 1]; below 2^-126 it counts as 0.
UNMASK_HD bool accepts_recorded(double u, float log_ratio) {
  if (log_ratio >= 0.0f) return u < 1.0;
  const float f = static_cast<float>(u);
  return f < kSmallestNormal ? log_ratio > neg_inf() : log_positive(f) < log_ratio;
}

enum class Verdict : int32_t { inactive, accepted, rejected, invalid };

struct RatioPosition {
  Verdict verdict;
  int32_t status;
  float log_ratio;
};

UNMASK_HD bool drawn_accepts(const RatioInputs& in, int64_t n, float log_ratio) {
  const Philox4 words = philox(in.seed_of(n), 0u, in.pos_of(n), in.step_of(n), kAcceptStream);
  return log_ratio >= 0.0f || -exponential_from_bits(words.x) < log_ratio;
}

// x_p, x_q: the logits of the drafted token, -inf if it is forbidden. Only for a readable position; `p`, `q`: its rows' sums, NaN in r for NaN.
UNMASK_HD RatioPosition judge(const RatioInputs& in, int64_t n, float x_p, const SumExp& p, float x_q,
                              const SumExp& q) {
  int32_t bits = kStatusOk;
  if (p.r != p.r || q.r != q.r) bits |= kStatusNaN;
  if ((p.r == p.r && p.m == neg_inf()) || (q.r == q.r && q.m == neg_inf())) bits |= kStatusAllInf;
  const bool recorded = in.uniforms.data != nullptr;
  if (recorded && !(in.uniforms[n] >= 0.0 && in.uniforms[n] <= 1.0)) bits |= kStatusNaNScore;
  if (bits != kStatusOk) return {Verdict::invalid, bits, quiet_nan()};
  const float log_ratio = log_ratio_of(x_p, p, x_q, q, in.scale, in.temper);
  const bool yes = recorded ? accepts_recorded(in.uniforms[n], log_ratio) : drawn_accepts(in, n, log_ratio);
  return {yes ? Verdict::accepted : Verdict::rejected, kStatusOk, log_ratio};
}

// A position whose rows are not read.
UNMASK_HD RatioPosition judge_unread(const RatioInputs& in, int64_t n) {
  if (in.inactive(n)) return {Verdict::inactive, kStatusOk, 0.0f};
  return {Verdict::invalid, in.entry_fault(n), quiet_nan()};
}

// ---- the residual -------------------------------------------------------------------------------------------------
// The best id of a part of the vocabulary. A part without residual mass offers its best of q, which counts where no part has any.
struct ResidualDraw {
  float score;
  int32_t id;  // -1: none
  bool of_residual;
};

UNMASK_HD ResidualDraw no_draw() { return {neg_inf(), -1, false}; }
UNMASK_HD bool beats(const ResidualDraw& a, const ResidualDraw& b) {
  if (a.id < 0 || b.id < 0 || a.of_residual == b.of_residual) return beats(Cand{a.score, a.id}, Cand{b.score, b.id});
  return a.of_residual;
}

// A softmax as masses: e^((x - m) scale) inverse
struct Masses {
  float m, inverse;

  UNMASK_HD float at(float x, float scale) const { return exp_neg(shifted(x, m) * scale) * inverse; }
};

UNMASK_HD Masses masses_of(const SumExp& sum) { return {sum.m, 1.0f / sum.total()}; }

}  // namespace unmask
