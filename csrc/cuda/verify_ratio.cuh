// verify_ratio on CUDA, device side: raw pointers only, no torch.
//
// Formula: common/verify_ratio.h. Layout: p_logits [P, V], q_logits [Q, V] with any strides, rows picked per packed position; a lane takes 8
// neighbouring ids at a time, 16 bytes a load where rows are dense. Bytes: 2 V x sizeof(dtype) a position, once, plus the same a span for the
// draw at its first rejection. Some 8 instructions an id for a sum: the bound is DRAM; some 60 an id that may be drawn, for Philox and two
// logarithms.
// Split, four to five launches that never wait for the host or for each other's blocks:
//   ratio_sums    a warp a chunk of 4,096 ids of one row of a position        -> parts
//   ratio_judge   a warp a position: merges its parts, compares u with the ratio -> sums, verdict, log_ratio
//   ratio_walk    a warp a span: the accepted prefix, the rejected position   -> accepted, status, next = -1
//   ratio_draws   a warp a chunk of a span's rejected position; others leave  -> draws
//   ratio_next    a warp a span: the best of its draws                        -> next
// Masses are computed as on the CPU, so a draw differs from the CPU's only by the rounding of the two sums.
#pragma once
#include "common/verify_ratio.h"
#include "cuda/logit_stats.cuh"

namespace unmask::cuda {

constexpr int kRatioRunIds = 32 * kRun;  // of a warp at a time
constexpr int kRatioRuns = static_cast<int>(kStatsChunk) / kRatioRunIds;

struct RatioJob {
  RatioInputs in;
  IdSet forbid;
  RatioOutputs out;
  int64_t chunks;
  bool dense[2];  // 16-byte loads are possible
  SumExp* parts;  // [N, 2, chunks]
  SumExp* sums;  // [N, 2]
  int32_t* verdict;  // [N]
  int32_t* bits;  // [N]
  int64_t* rejected;  // [B]: position, -1 = none
  ResidualDraw* draws;  // [B, chunks]
};

// ---- rows ---------------------------------------------------------------------------------------------------------
// One chunk of a row, run by run, forbidden ids at -inf.
template <FloatType kType>
struct RatioChunk {
  using Bits = typename Element<kType>::Bits;
  const Bits* row;
  int64_t stride, vocab, first;
  bool dense;
  const uint32_t* marks;  // nullptr: nothing is forbidden here

  UNMASK_DEVICE RatioChunk(const RatioJob& job, int side, int64_t n, int64_t chunk, const uint32_t* forbidden)
      : row(static_cast<const Bits*>(job.in.side[side].logits) +
            job.in.side[side].row[n] * job.in.side[side].stride[0]),
        stride(job.in.side[side].stride[1]),
        vocab(job.in.vocab),
        first(chunk * kStatsChunk),
        dense(job.dense[side]),
        marks(forbidden) {}

  UNMASK_DEVICE int64_t id(int run) const { return first + run * kRatioRunIds + lane_id() * kRun; }
  UNMASK_DEVICE void load(int run, float (&x)[kRun]) const {  // behind the vocabulary: -inf
    const Run<kType> values = load_run<kType>(row, stride, dense, id(run), vocab);
#pragma unroll
    for (int k = 0; k < kRun; ++k) x[k] = values.get(k);
    if (marks != nullptr) set_marked(x, reinterpret_cast<const unsigned char*>(marks)[run * 32 + lane_id()], neg_inf());
  }
};

// The marks of a chunk's forbidden ids in the warp's shared words, or nullptr if it has none.
UNMASK_DEVICE const uint32_t* mark_forbidden(const RatioJob& job, int64_t chunk, uint32_t (&marks)[kMarkWords]) {
  const int64_t first = chunk * kStatsChunk;
  const int64_t n = job.in.vocab - first < kStatsChunk ? job.in.vocab - first : kStatsChunk;
  return mark_ids(job.forbid, first, n, marks) ? marks : nullptr;
}

// ---- sums ---------------------------------------------------------------------------------------------------------
// LaneSum of logit_stats.cuh with a factor on the exponent, without t: n ids at m, which the warp shares, and r over the others.
struct TemperedLane {
  float m = neg_inf(), n = 0.0f, r = 0.0f;
  bool nan = false;

  UNMASK_DEVICE void raise(float to, float scale) {
    nan = nan || r != r;
    r = m == neg_inf() || to == pos_inf() ? 0.0f : exp_neg((m - to) * scale) * (n + r);
    n = 0.0f;
    m = to;
  }
  UNMASK_DEVICE void add(const float (&x)[kRun], float scale) {
    const float shift = m == neg_inf() ? 0.0f : m;
    float more = 0.0f;  // a second chain, for latency
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      const bool top = x[k] == m;
      const float d = top ? 0.0f : max_keep_nan((x[k] - shift) * scale, kExpMin);
      const float e = exp2_approx(d * kLog2e);
      n = n + (top ? 1.0f : 0.0f);
      if (k % 2 == 0) r = r + (top ? 0.0f : e);
      else more = more + (top ? 0.0f : e);
    }
    r = r + more;
  }
};

template <FloatType kType>
UNMASK_KERNEL_BOUNDS(kWarpsPerBlock * 32, 4)
ratio_sums(const RatioJob job) {
  __shared__ uint32_t marks[kWarpsPerBlock][kMarkWords];
  const int64_t index = block_index() * kWarpsPerBlock + warp_in_block();
  const int64_t n = index / (2 * job.chunks), chunk = index % job.chunks;
  if (n >= job.in.positions || !job.in.readable(n)) return;
  const int side = static_cast<int>(index / job.chunks % 2);
  const RatioChunk<kType> row(job, side, n, chunk, mark_forbidden(job, chunk, marks[warp_in_block()]));
  TemperedLane sum;
#pragma unroll 2
  for (int run = 0; run < kRatioRuns; ++run) {
    float x[kRun];
    row.load(run, x);
    const float best = warp_max(lane_max(x));
    if (best > sum.m) sum.raise(best, job.in.scale);
    sum.add(x, job.in.scale);
  }
  const bool nan = warp_ballot(sum.nan || sum.r != sum.r) != 0;
  const float total = warp_sum(sum.n) - 1.0f + warp_sum(sum.r);
  if (lane_id() == 0) job.parts[index] = {sum.m, nan ? quiet_nan() : total, 0.0f};
}

// Chunks lane, lane + 32, .. in each lane, then the lanes in a tree.
UNMASK_DEVICE SumExp merge_parts_in_warp(const SumExp* parts, int64_t chunks, float scale) {
  SumExp all = empty_sum();
  for (int64_t c = lane_id(); c < chunks; c += 32) all = merge_or_nan(all, parts[c], scale);
  for (int mask = 1; mask < 32; mask <<= 1) {
    const SumExp other = {warp_get_xor(all.m, mask), warp_get_xor(all.r, mask), 0.0f};
    all = (lane_id() & mask) != 0 ? merge_or_nan(other, all, scale) : merge_or_nan(all, other, scale);
  }
  return all;
}

// ---- positions and spans ------------------------------------------------------------------------------------------
template <FloatType kType>
UNMASK_DEVICE float logit_at(const RatioSide& s, int64_t n, int64_t id) {
  using Bits = typename Element<kType>::Bits;
  return Element<kType>::value(static_cast<const Bits*>(s.logits)[s.row[n] * s.stride[0] + id * s.stride[1]]);
}

template <FloatType kType>
UNMASK_KERNEL_BOUNDS(kWarpsPerBlock * 32, 4)
ratio_judge(const RatioJob job) {
  const RatioInputs& in = job.in;
  const int64_t n = block_index() * kWarpsPerBlock + warp_in_block();
  if (n >= in.positions) return;
  RatioPosition result = judge_unread(in, n);
  if (in.readable(n)) {
    SumExp sum[2];
    for (int s = 0; s < 2; ++s)
      sum[s] = merge_parts_in_warp(job.parts + (2 * n + s) * job.chunks, job.chunks, in.scale);
    const int64_t token = in.token[n];
    bool forbidden = false;
    for (int64_t i = lane_id(); i < job.forbid.n; i += 32)
      forbidden = forbidden || job.forbid.ids[i * job.forbid.stride] == token;
    forbidden = warp_ballot(forbidden) != 0;
    if (lane_id() == 0) {
      const float x = forbidden ? neg_inf() : logit_at<kType>(in.side[0], n, token);
      const float y = forbidden ? neg_inf() : logit_at<kType>(in.side[1], n, token);
      result = judge(in, n, x, sum[0], y, sum[1]);
      job.sums[2 * n] = sum[0], job.sums[2 * n + 1] = sum[1];
    }
  }
  if (lane_id() != 0) return;
  job.verdict[n] = static_cast<int32_t>(result.verdict), job.bits[n] = result.status;
  job.out.log_ratio[n] = result.log_ratio;
}

// kStatusBadId if an id to forbid is not below the vocabulary.
UNMASK_DEVICE uint32_t list_status(const RatioJob& job) {
  bool bad = false;
  for (int64_t i = lane_id(); i < job.forbid.n; i += 32)
    bad = bad || job.forbid.ids[i * job.forbid.stride] >= job.in.vocab;
  return warp_ballot(bad) != 0 ? kStatusBadId : kStatusOk;
}

UNMASK_KERNEL_BOUNDS(kWarpsPerBlock * 32, 4) ratio_walk(const RatioJob job) {
  const int64_t span = block_index() * kWarpsPerBlock + warp_in_block();
  if (span >= job.in.spans) return;
  const int64_t begin = job.in.cu[span], end = job.in.cu[span + 1];
  const bool fits = begin >= 0 && begin <= end && end <= job.in.positions;
  uint32_t bits = fits ? kStatusOk : kStatusBadSegment;
  int64_t accepted = 0, rejected = -1;
  for (int64_t base = begin; fits && base < end; base += 32) {  // the same in every lane
    const int64_t n = base + lane_id();
    const Verdict verdict = n < end ? static_cast<Verdict>(job.verdict[n]) : Verdict::inactive;
    const uint32_t ends = warp_ballot(verdict == Verdict::inactive);
    const bool live = ends == 0 || lane_id() < lowest_bit(ends);
    if (live) bits |= static_cast<uint32_t>(job.bits[n]);
    const uint32_t stops = warp_ballot(live && verdict != Verdict::accepted);
    if (rejected < 0) {
      accepted += stops != 0 ? lowest_bit(stops) : ends != 0 ? lowest_bit(ends) : 32;
      if (stops != 0) rejected = base + lowest_bit(stops);
    }
    if (ends != 0) break;
  }
  bits = warp_or_u32(bits);
  const uint32_t listed = list_status(job);
  if (lane_id() != 0) return;
  job.out.accepted[span] = bits == kStatusOk ? accepted : 0;
  job.out.next[span] = -1;
  job.out.status[span] = static_cast<int32_t>(bits | listed);
  job.rejected[span] = bits == kStatusOk ? rejected : -1;
}

// ---- the residual -------------------------------------------------------------------------------------------------
// The best of this lane so far; ids rise, so a tie stays with the earlier one.
UNMASK_DEVICE void score_masses(const RatioInputs& in, int64_t n, const float (&w)[kRun], int64_t base, Sample* best) {
#pragma unroll
  for (int k = 0; k < kRun; k += 4) {
    const float most = max_drop_nan(max_drop_nan(w[k], w[k + 1]), max_drop_nan(w[k + 2], w[k + 3]));
    if (most < kSmallestNormal || !(log_positive(most) + kGumbelMax > best->score)) continue;
    const Philox4 words =
        philox(in.seed_of(n), static_cast<uint32_t>((base + k) >> 2), in.pos_of(n), in.step_of(n), kResidualStream);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (w[k + j] < kSmallestNormal) continue;
      const float score = log_positive(w[k + j]) + gumbel_from_bits(philox_word(words, static_cast<uint32_t>(j)));
      if (score > best->score) *best = {score, static_cast<int32_t>(base + k + j), score};
    }
  }
}

template <FloatType kType>
UNMASK_KERNEL_BOUNDS(kWarpsPerBlock * 32, 4)
ratio_draws(const RatioJob job) {
  __shared__ uint32_t marks[kWarpsPerBlock][kMarkWords];
  const int64_t index = block_index() * kWarpsPerBlock + warp_in_block();
  const int64_t span = index / job.chunks, chunk = index % job.chunks;
  if (span >= job.in.spans) return;
  const int64_t n = job.rejected[span];
  if (n < 0) return;
  const uint32_t* forbidden = mark_forbidden(job, chunk, marks[warp_in_block()]);
  const RatioChunk<kType> p(job, 0, n, chunk, forbidden), q(job, 1, n, chunk, forbidden);
  const Masses of_p = masses_of(job.sums[2 * n]), of_q = masses_of(job.sums[2 * n + 1]);
  ResidualDraw found = no_draw();
  for (int pass = 0; pass < 2 && found.id < 0; ++pass) {  // the second, of q alone, if the chunk has no residual
    Sample mine = {neg_inf(), -1, neg_inf()};
    for (int run = 0; run < kRatioRuns && p.first + run * kRatioRunIds < job.in.vocab; ++run) {
      float x[kRun], w[kRun];
      q.load(run, w);
#pragma unroll
      for (int k = 0; k < kRun; ++k) w[k] = of_q.at(w[k], job.in.scale);
      if (pass == 0) {
        p.load(run, x);
#pragma unroll
        for (int k = 0; k < kRun; ++k) w[k] = w[k] - of_p.at(x[k], job.in.scale);
      }
      score_masses(job.in, n, w, p.id(run), &mine);
    }
    const Sample best = warp_best(mine);
    found = {best.score, best.id, pass == 0};
  }
  if (lane_id() == 0) job.draws[index] = found;
}

UNMASK_KERNEL_BOUNDS(kWarpsPerBlock * 32, 4) ratio_next(const RatioJob job) {
  const int64_t span = block_index() * kWarpsPerBlock + warp_in_block();
  if (span >= job.in.spans || job.rejected[span] < 0) return;
  ResidualDraw best = no_draw();
  for (int64_t c = lane_id(); c < job.chunks; c += 32) {
    const ResidualDraw& part = job.draws[span * job.chunks + c];
    if (beats(part, best)) best = part;
  }
  const bool residual = warp_ballot(best.id >= 0 && best.of_residual) != 0;
  const bool counts = best.id >= 0 && best.of_residual == residual;
  const Sample all = warp_best({counts ? best.score : neg_inf(), counts ? best.id : -1, 0.0f});
  if (lane_id() == 0) job.out.next[span] = all.id;
}

}  // namespace unmask::cuda
