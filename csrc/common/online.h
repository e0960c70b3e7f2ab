// The running state of the logit statistics and its merges: plain data, one header for the CPU (every ISA) and CUDA.
//
// Work is cut into chunks of kStatsChunk ids. Each chunk yields a shifted triple over the ids that are in the softmax,
//   m = max x,  r = sum of e^(x-m) over all ids but one at m,  t = sum (x-m) e^(x-m)
// and candidates ordered by (value desc, id asc). Chunks fold into the state strictly left to right from the empty
// sum, so any tiling at multiples of kStatsChunk gives the same bits as one pass. Then with M, R, T of the whole row and
// S = 1 + R
//   logsumexp = M + ln S,  p(x) = e^(x-M) / S,  entropy = ln S - T/S,  1 - p(M) = R / S.
// The 1 stays out of the sum because models are often sure: beside it fp32 loses whatever is below 6e-8, and positions
// that all read p = 1 could no longer be ordered. Apart, 1 - p, ln p and the entropy keep their relative precision.
// +inf: M = +inf, R = how many more ids sit there, T = 0; the same formulas then give p = 1/k, entropy = ln k,
// logsumexp = +inf, provided that x - M is taken as 0 where x == M (shifted() below).
#pragma once
#include <cstdint>

#include "common/noise.h"
#include "common/status.h"

namespace unmask {

constexpr int64_t kStatsChunk = 4096;
constexpr int kTopMax = 8;

UNMASK_HD float pos_inf() { return float_of_bits(0x7F800000u); }
UNMASK_HD float neg_inf() { return float_of_bits(0xFF800000u); }
UNMASK_HD float quiet_nan() { return float_of_bits(0x7FC00000u); }

// ---- sums ---------------------------------------------------------------------------------------------------------
struct SumExp {
  float m, r, t;  // empty: m = -inf, and the others then mean nothing

  UNMASK_HD float total() const { return 1.0f + r; }
};

UNMASK_HD SumExp empty_sum() { return {neg_inf(), 0.0f, 0.0f}; }
UNMASK_HD float shifted(float x, float m) { return x == m ? 0.0f : x - m; }

// a is left of b. Exactly one of the two factors is 1, so the merge rounds the other side only.
UNMASK_HD SumExp merge_sum(const SumExp& a, const SumExp& b) {
  if (b.m == neg_inf()) return a;
  if (a.m == neg_inf()) return b;
  const bool left =
      a.m >=
      b.m;  // which side holds the maximum (fields, not references: those would send both to local memory on CUDA)
  const SumExp hi = {left ? a.m : b.m, left ? a.r : b.r, left ? a.t : b.t};
  const SumExp lo = {left ? b.m : a.m, left ? b.r : a.r, left ? b.t : a.t};
  const float d = shifted(lo.m, hi.m), s = lo.total();
  const float e = exp_neg(d);  // 0 when hi.m is +inf and lo.m is not: then the low side is dropped whole (no -inf * 0)
  if (e == 0.0f) return hi;
  return {hi.m, UNMASK_FMA(e, s, hi.r), UNMASK_FMA(e, UNMASK_FMA(d, s, lo.t), hi.t)};
}

// ---- candidates ---------------------------------------------------------------------------------------------------
struct Cand {
  float v;
  int32_t id;
};  // none: {-inf, -1}

UNMASK_HD Cand no_cand() { return {neg_inf(), -1}; }
// The total order (value desc, id asc); none loses against everything.
UNMASK_HD bool beats(const Cand& a, const Cand& b) {
  if (a.id < 0 || b.id < 0) return b.id < 0 && a.id >= 0;
  return a.v > b.v || (a.v == b.v && a.id < b.id);
}

struct Top2 { Cand a, b; };

UNMASK_HD Top2 merge_top2(const Top2& l, const Top2& r) {
  if (beats(l.a, r.a)) return {l.a, beats(l.b, r.a) ? l.b : r.a};
  return {r.a, beats(r.b, l.a) ? r.b : l.a};
}

// Inserts c into list[0..k), sorted best first.
UNMASK_HD void insert_cand(Cand* list, int k, Cand c) {
  for (int i = 0; i < k; ++i) {
    if (beats(c, list[i])) {
      const Cand old = list[i];
      list[i] = c;
      c = old;
    }
  }
}

// The sampled token: compared by score = fma(T, g, x), reported by its clean logit x. Same total order on (score, id).
struct Sample {
  float score;
  int32_t id;
  float x;
};

UNMASK_HD bool beats(const Sample& a, const Sample& b) { return beats(Cand{a.score, a.id}, Cand{b.score, b.id}); }

// ---- state of one entry -------------------------------------------------------------------------------------------
// Only int32 words (a row of the int32 state tensor); all zero bytes = empty.
struct StatsState {
  int32_t next;  // ids [0, next) are folded in; 0 = empty, the rest is then meaningless
  int32_t kept;  // how many of top[] are maintained: max(2, topk)
  int32_t status;
  SumExp sum;  // every id that is not suppressed
  Sample sample;  // token so far; at temperature 0 it equals top[0]
  Cand top[kTopMax];  // best candidates (not suppressed, not forbidden, above -inf), best first
};
constexpr int64_t kStateWords = sizeof(StatsState) / 4;
static_assert(sizeof(StatsState) == 25 * 4, "state words are part of the interface");

UNMASK_HD void reset_state(StatsState* st, int kept) {
  st->next = 0;
  st->kept = kept;
  st->status = 0;
  st->sum = empty_sum();
  st->sample = {neg_inf(), -1, neg_inf()};
  for (int i = 0; i < kTopMax; ++i) st->top[i] = no_cand();
}

// ---- the end ------------------------------------------------------------------------------------------------------
struct EntryStats {
  int64_t token;
  float p, p1, p2, entropy, logsumexp, p_rest;
  int32_t status;
};

UNMASK_HD EntryStats none_stats() { return {-1, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, kStatusOk}; }
UNMASK_HD EntryStats invalid_stats(int32_t status) {
  const float n = quiet_nan();
  return {-1, n, n, n, n, n, n, status};
}

// kStatusBadId leaves the entry valid (only the output at that id is -inf); every other bit makes it invalid.
UNMASK_HD bool is_invalid(int32_t status) { return (status & ~static_cast<int32_t>(kStatusBadId)) != 0; }

UNMASK_HD float probability(float x, const SumExp& sum) { return exp_neg(shifted(x, sum.m)) / sum.total(); }

// 1 - p(x). Only an id at the maximum can be near 1, where p itself has lost the digits.
UNMASK_HD float probability_of_others(float x, const SumExp& sum) {
  return x == sum.m ? sum.r / sum.total() : 1.0f - probability(x, sum);
}

// ln S, to full relative precision near S = 1 too
UNMASK_HD float log_total(const SumExp& sum) {
  return sum.r < 0.4f ? log_reduced(sum.r, 0.0f) : log_positive(sum.total());
}

UNMASK_HD EntryStats finish_stats(const StatsState& st) {
  if (st.next == 0) return none_stats();
  int32_t status = st.status;
  if (!is_invalid(status) && st.top[0].id < 0) status |= kStatusAllInf;
  if (is_invalid(status)) return invalid_stats(status);
  const float log_s = log_total(st.sum);
  return {st.sample.id,
          probability(st.sample.x, st.sum),
          probability(st.top[0].v, st.sum),
          st.top[1].id < 0 ? 0.0f : probability(st.top[1].v, st.sum),
          log_s - st.sum.t / st.sum.total(),
          st.sum.m + log_s,
          probability_of_others(st.sample.x, st.sum),
          status};
}

// log p at an id whose logit is x (-inf: suppressed, out of range or none)
UNMASK_HD float log_probability(float x, const SumExp& sum) {
  return x == neg_inf() ? x : shifted(x, sum.m) - log_total(sum);
}

}  // namespace unmask
