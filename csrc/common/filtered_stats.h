// What filtered_stats decides and reports, the same on every backend: plain data and arithmetic, no memory.
//
// Order. Ids are ordered by (logit desc, id asc); a positive temperature changes neither. A kept set is always the head of that order up to
// some id, so it is one Cut: every id above `x`, and of the ids at `x` those up to `last`.
//
// Mass. e^((x - M) / T), M the row's largest logit, T the temperature, comes from exp_neg and is then cut to a multiple of 2^-b,
// b = 62 - ceil(log2 V): sums of integers do not depend on their order, so a histogram may be filled by any thread at any time. What is
// cut off is below V 2^-b = 2^-28 of the largest mass for V = 131,072. top-p asks how much mass lies before an id:
//   removed  <=>  sum of the masses before it > top_p S,  S = the sum over all ids (or over those that top-k left, if it goes first)
// S over all ids is an fp32 sum in chunks, as in logit_stats: good to 1e-6. A cut can therefore differ from exact arithmetic, and between
// backends, only where the mass before an id is within 1e-6 S of top_p S.
#pragma once
#include <cstdint>

#include "common/online.h"

namespace unmask {

struct Filters {
  double top_p;  // 1 or more: off
  int64_t top_k;  // 0: off
  bool top_k_first;
  float temperature;  // what logits are divided by: 1 if the call's temperature is 0
  float scale;  // 1 / temperature
  int32_t mass_bits;

  UNMASK_HD bool by_mass() const { return top_p < 1.0; }
  UNMASK_HD bool by_count() const { return top_k > 0; }
  UNMASK_HD bool any() const { return by_mass() || by_count(); }
};

// ---- order --------------------------------------------------------------------------------------------------------
// Floats as unsigned integers in the same order; -0 and +0 are one key. No NaN.
UNMASK_HD uint32_t logit_key(float x) {
  const uint32_t u = bits_of_float(x + 0.0f);
  return (u & 0x80000000u) != 0 ? ~u : u | 0x80000000u;
}
UNMASK_HD float logit_of_key(uint32_t key) {
  return float_of_bits((key & 0x80000000u) != 0 ? key & 0x7FFFFFFFu : ~key);
}
// The largest float below x > -inf.
UNMASK_HD float next_below(float x) {
  if (x == 0.0f) return -0x1p-149f;
  return float_of_bits(bits_of_float(x) + (x > 0.0f ? 0xFFFFFFFFu : 1u));
}

struct Cut {
  float x;
  int32_t last;

  UNMASK_HD bool keeps(float v, int32_t id) const { return v > x || (v == x && id <= last); }
};

UNMASK_HD Cut no_cut() { return {neg_inf(), -1}; }  // every id above -inf
UNMASK_HD Cut tighter(const Cut& a, const Cut& b) {
  if (a.x != b.x) return a.x > b.x ? a : b;
  return {a.x, a.last < b.last ? a.last : b.last};
}

// ---- mass ---------------------------------------------------------------------------------------------------------
UNMASK_HD float tempered(float x, float m, float scale) { return shifted(x, m) * scale; }

UNMASK_HD int32_t mass_bits(int64_t vocab) {
  int32_t bits = 62;
  for (int64_t n = 1; n < vocab; n *= 2) --bits;
  return bits;
}
UNMASK_HD float mass_unit(int32_t bits) { return float_of_bits(static_cast<uint32_t>(bits + 127) << 23); }  // 2^bits
// e in [0, 1]
UNMASK_HD uint64_t mass_of(float e, float unit) { return static_cast<uint64_t>(static_cast<int64_t>(e * unit)); }

// The integer part of top_p * total; total counts in units of 2^-bits.
UNMASK_HD uint64_t mass_limit(double top_p, double total) { return static_cast<uint64_t>(top_p * total); }

// No id below it can be kept by top-p: were all V ids as light as it, the mass from it on would still be below (1 - top_p) S, and what lies
// before it above top_p S. 1% off for the roundings.
UNMASK_HD float lightest_kept(const Filters& f, float m, float s, int64_t vocab) {
  if (m == pos_inf()) return m;  // ids at +inf have all the mass
  const float share = static_cast<float>((1.0 - f.top_p) * static_cast<double>(s) / static_cast<double>(vocab));
  return next_below(UNMASK_FMA(f.temperature, log_positive(share) - 0.01f, m));
}

// ---- sums ---------------------------------------------------------------------------------------------------------
// merge_sum of online.h for sums of e^((x - m) / T).
UNMASK_HD SumExp merge_tempered(const SumExp& a, const SumExp& b, float scale) {
  if (b.m == neg_inf()) return a;
  if (a.m == neg_inf()) return b;
  const bool left = a.m >= b.m;
  const SumExp hi = {left ? a.m : b.m, left ? a.r : b.r, left ? a.t : b.t};
  const SumExp lo = {left ? b.m : a.m, left ? b.r : a.r, left ? b.t : a.t};
  const float d = tempered(lo.m, hi.m, scale), s = lo.total();
  const float e = exp_neg(d);
  if (e == 0.0f) return hi;
  return {hi.m, UNMASK_FMA(e, s, hi.r), UNMASK_FMA(e, UNMASK_FMA(d, s, lo.t), hi.t)};
}

// One more id below the maximum.
UNMASK_HD SumExp with_id(const SumExp& sum, float x, float scale) {
  const float d = tempered(x, sum.m, scale), e = exp_neg(d);
  if (e == 0.0f) return sum;
  return {sum.m, sum.r + e, UNMASK_FMA(d, e, sum.t)};
}

// ---- the end ------------------------------------------------------------------------------------------------------
// finish_stats of online.h for a tempered sum. top[1].id < 0: there is one candidate only.
UNMASK_HD EntryStats finish_filtered(const Filters& f, const SumExp& sum, const Sample& sample, const Cand& first,
                                     const Cand& second, int32_t status) {
  const float log_s = log_total(sum), total = sum.total();
  const float p = exp_neg(tempered(sample.x, sum.m, f.scale)) / total;
  const float p1 = exp_neg(tempered(first.v, sum.m, f.scale)) / total;
  const float p2 = second.id < 0 ? 0.0f : exp_neg(tempered(second.v, sum.m, f.scale)) / total;
  return {sample.id,
          p,
          p1,
          p2,
          log_s - sum.t / total,
          sum.m / f.temperature + log_s,
          sample.x == sum.m ? sum.r / total : 1.0f - p,
          status};
}

}  // namespace unmask
