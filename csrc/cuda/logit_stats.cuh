// logit_stats on CUDA, device side: raw pointers only, no torch. csrc/common/online.h has the arithmetic of the merges.
//
//   m = max x, s = sum e^(x-m), t = sum (x-m) e^(x-m) over each chunk of 4,096 ids; chunks merge strictly left to right, so an entry's
//   bits do not depend on the batch, on the launch or on how the vocabulary is tiled.
//
// Layout: logits [N, V] with any strides; entry e reads row rows[e]. Each lane takes 8 neighbouring ids at a time, a
// warp 2 x 32 x 8 = 512 (a slice), whatever the dtype and strides: the order of the sums is fixed. Dense rows are read
// 16 bytes a lane. Bytes: V x sizeof(dtype) a row, once, plus 12 B a chunk and 80 B a group of partial results. About
// 10 instructions an id at temperature 0 (convert, max, subtract, clamp, scale, ex2, two sums), so the bound is DRAM: 2
// B an id in bf16. Split: stats_scan gives one warp a group of 1..8 whole chunks of one entry; warps never wait for
// each other (no block barrier, no atomics between warps). stats_fold gives one warp an entry: it folds that entry's
// partials in order and writes the outputs. Two launches and no ticket counter: a counter would have to survive between
// calls, and would be shared by streams that run at once. Few rows on sm_90 and later take one launch (stats_cluster): the blocks of a
// cluster wait for each other without a counter, and the sums are the same.
//
// Candidates: a warp keeps its best `kept` (<= 8) in lanes 0..7. A slice is searched only if its maximum beats the
// worst of them, which gets rare after a few slices. Sampling: a slice is skipped if its maximum plus the largest noise
// cannot win.
#pragma once
#include "common/logit_stats_params.h"
#include "common/philox.h"
#include "cuda/common/elements.cuh"

namespace unmask::cuda {

constexpr int kWarpsPerBlock = 4;
constexpr int kMostClusterWarps = 8;  // per block of stats_cluster
constexpr int kSliceIds = 512;  // 2 runs a lane
constexpr int kSliceValues = 16;
constexpr int kSlices = static_cast<int>(kStatsChunk) / kSliceIds;
constexpr int kMarkWords = static_cast<int>(kStatsChunk) / 32;

struct IdSet {
  const int64_t* ids;
  int64_t n, stride;
};

// What one group of chunks found, besides the sums of its chunks.
struct GroupBest {
  int32_t status;
  Sample sample;
  Cand top[kTopMax];  // the first `kept` are written
};

// One launch covers entries [entry_begin, entry_begin + entries).
struct StatsJob {
  StatsInputs in;
  IdSet forbid, suppress;
  const int64_t* rows;  // nullptr: entry e reads row e
  int64_t rows_stride, n_rows;
  int64_t entry_begin, entries;
  int64_t chunks, group_chunks, groups;
  bool dense;  // 16-byte loads are possible
  SumExp* sums;  // [entries, chunks]
  GroupBest* best;  // [entries, groups]
  const float* id_logit;  // [entries, n_ids]: the logits at `ids`, where there are no logits to read; else null
  bool tree;  // chunks merge in a tree, not left to right
};

UNMASK_DEVICE int64_t row_of(const StatsJob& job, int64_t entry) {
  return job.rows != nullptr ? job.rows[entry * job.rows_stride] : entry;
}
UNMASK_DEVICE bool row_exists(const StatsJob& job, int64_t row) { return row >= 0 && row < job.n_rows; }

// ---- loads --------------------------------------------------------------------------------------------------------
// Columns [i, i + 8) of a row; columns at or beyond `count` read as -inf.
template <FloatType kType>
UNMASK_DEVICE Run<kType> load_run(const typename Element<kType>::Bits* row, int64_t stride, bool dense, int64_t i,
                                  int64_t count) {
  Run<kType> r;
  if (dense && i + kRun <= count) {
    r.load_constant(row + i);
    return r;
  }
#pragma unroll
  for (int k = 0; k < kRun; ++k) {
    const uint32_t bits = i + k < count ? row[(i + k) * stride] : Element<kType>::kNegInf;
    if constexpr (kType == FloatType::f32) r.v[k / 4].w[k % 4] = bits;
    else if (k % 2 == 0) r.v[0].w[k / 2] = bits;
    else r.v[0].w[k / 2] |= bits << 16;
  }
  return r;
}

// u + w (c - u), rounded after each operation as torch's eager code rounds.
template <FloatType kType>
UNMASK_DEVICE float guided(float c, float u, float w) {
  return rounded<kType>(u + rounded<kType>(w * rounded<kType>(c - u)));
}

// A slice as a lane holds it: two runs of the logits, with guidance also two of the null logits.
template <FloatType kType, bool kGuided>
struct Loaded {
  Run<kType> run[kGuided ? 4 : 2];

  UNMASK_DEVICE float get(int k, float w) const {
    const float c = run[k / kRun].get(k % kRun);
    if constexpr (kGuided) return guided<kType>(c, run[2 + k / kRun].get(k % kRun), w);
    else return c;
  }
};

template <FloatType kType>
UNMASK_DEVICE float logit_as(const StatsInputs& in, int64_t row, int64_t column) {
  using Bits = typename Element<kType>::Bits;
  const auto at = [&](const void* logits, int64_t i) {
    return Element<kType>::value(static_cast<const Bits*>(logits)[i]);
  };
  const float c = at(in.logits, row * in.row_stride + column * in.col_stride);
  if (in.null_logits == nullptr) return c;
  return guided<kType>(c, at(in.null_logits, row * in.null_row_stride + column * in.null_col_stride), in.guidance);
}

UNMASK_DEVICE float load_logit(const StatsInputs& in, int64_t row, int64_t column) {
  switch (in.type) {
    case FloatType::f32: return logit_as<FloatType::f32>(in, row, column);
    case FloatType::bf16: return logit_as<FloatType::bf16>(in, row, column);
    case FloatType::f16: return logit_as<FloatType::f16>(in, row, column);
  }
  return quiet_nan();
}

// ---- ids that are forbidden, suppressed or biased -----------------------------------------------------------------
// Marks the ids of `set` that lie in [base, base + n) in a bit per id. False, and nothing written, if there are none.
UNMASK_DEVICE bool mark_ids(const IdSet& set, int64_t base, int64_t n, uint32_t* marks, int words = kMarkWords) {
  bool any = false;
  for (int64_t i = lane_id(); i < set.n; i += 32) {
    const int64_t at = set.ids[i * set.stride] - base;
    any = any || (at >= 0 && at < n);
  }
  if (warp_ballot(any) == 0) return false;
  warp_sync();  // the marks of the chunk before have been read
  for (int w = lane_id(); w < words; w += 32) marks[w] = 0;
  warp_sync();
  for (int64_t i = lane_id(); i < set.n; i += 32) {
    const int64_t at = set.ids[i * set.stride] - base;
    if (at >= 0 && at < n) shared_or(&marks[at >> 5], 1u << (at & 31));
  }
  warp_sync();
  return true;
}

// The 16 marks of this lane in a slice, in the order of its values.
UNMASK_DEVICE uint32_t lane_marks(const uint32_t* marks, int slice) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(marks) + slice * (kSliceIds / 8) + lane_id();
  return bytes[0] | static_cast<uint32_t>(bytes[32]) << 8;
}

UNMASK_DEVICE int64_t bias_id(const StatsInputs& in, int64_t entry, int64_t j) {
  return in.bias_ids[entry * in.bias_ids_stride[0] + j * in.bias_ids_stride[1]];
}
UNMASK_DEVICE float bias_value(const StatsInputs& in, int64_t entry, int64_t j) {
  return in.bias[entry * in.bias_stride[0] + j * in.bias_stride[1]];
}

UNMASK_DEVICE bool bias_in(const StatsInputs& in, int64_t entry, int64_t base, int64_t n) {
  bool any = false;
  for (int64_t j = lane_id(); j < in.n_bias; j += 32) {
    const int64_t at = bias_id(in, entry, j) - base;
    any = any || (at >= 0 && at < n);
  }
  return warp_ballot(any) != 0;
}

// Place of a slice's id (0..511) among the values of the lane that holds it, and back.
UNMASK_DEVICE int lane_of(int at) { return (at >> 3) & 31; }
UNMASK_DEVICE int value_of(int at) { return (at >> 8) * kRun + (at & 7); }
UNMASK_DEVICE int slice_id(int value, int lane) { return (value >> 3) * 256 + lane * kRun + (value & 7); }

// A slice of kN values a lane: 512 ids for kSliceValues, 256 for 8; the first `count` exist (behind them -inf + inf would be NaN).
template <int kN>
UNMASK_DEVICE void add_bias(const StatsInputs& in, int64_t entry, int64_t base, int64_t count, float (&x)[kN]) {
  for (int64_t j = 0; j < in.n_bias; ++j) {  // in list order: duplicates add up
    const int64_t at = bias_id(in, entry, j) - base;
    if (at < 0 || at >= kN * 32 || at >= count || lane_of(static_cast<int>(at)) != lane_id()) continue;
    const int i = value_of(static_cast<int>(at));
    const float b = bias_value(in, entry, j);
#pragma unroll
    for (int k = 0; k < kN; ++k) x[k] = k == i ? x[k] + b : x[k];
  }
}

template <int kN>
UNMASK_DEVICE void set_marked(float (&x)[kN], uint32_t marks, float v) {
#pragma unroll
  for (int k = 0; k < kN; ++k) x[k] = (marks >> k & 1u) != 0 ? v : x[k];
}

// ---- reductions ---------------------------------------------------------------------------------------------------
template <int kN>
UNMASK_DEVICE float lane_max(const float (&x)[kN]) {  // NaN loses
  float m = x[0];
#pragma unroll
  for (int k = 1; k < kN; ++k) m = max_drop_nan(m, x[k]);
  return max_drop_nan(m, neg_inf());
}

// The sums of this lane, relative to a maximum m that the whole warp shares: n ids at m, r and t over the others.
struct LaneSum {
  float m = neg_inf(), n = 0.0f, r = 0.0f, t = 0.0f;
  bool nan = false;

  // Moves to a larger maximum.
  UNMASK_DEVICE void raise(float to) {
    if (m == neg_inf() ||
        to == pos_inf()) {  // what was summed is nothing, or counts for nothing; but a NaN must not get lost
      nan = nan || r != r;
      r = t = 0.0f;
    } else {
      const float d = m - to, e = exp_neg(d), s = n + r;
      t = e * UNMASK_FMA(d, s, t);
      r = e * s;
    }
    n = 0.0f;
    m = to;
  }

  template <int kN>
  UNMASK_DEVICE void add(const float (&x)[kN]) {
    if (m == pos_inf()) {
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        nan = nan || x[k] != x[k];
        n = n + (x[k] == pos_inf() ? 1.0f : 0.0f);
      }
      return;
    }
    const float shift = m == neg_inf() ? 0.0f : m;
    float r1 = 0.0f, t1 = 0.0f;  // a second chain, for latency
#pragma unroll
    for (int k = 0; k < kN; k += 2) {
      const float d0 = max_keep_nan(x[k] - shift, kExpMin), d1 = max_keep_nan(x[k + 1] - shift, kExpMin);
      const float e0 = exp2_approx(d0 * kLog2e), e1 = exp2_approx(d1 * kLog2e);
      const bool at0 = x[k] == m, at1 = x[k + 1] == m;
      n = n + (at0 ? 1.0f : 0.0f) + (at1 ? 1.0f : 0.0f);
      r = r + (at0 ? 0.0f : e0);
      r1 = r1 + (at1 ? 0.0f : e1);
      t = UNMASK_FMA(d0, e0, t);
      t1 = UNMASK_FMA(d1, e1, t1);
    }
    r = r + r1;
    t = t + t1;
  }
};

// The best `kept` candidates, best first: lane i holds the i-th. Candidates come with rising ids, so a tie keeps what
// is there.
struct TopList {
  float v = neg_inf();
  int32_t id = -1;
  float bar = neg_inf();  // in every lane: what a newcomer must beat

  UNMASK_DEVICE void insert(int kept, float value, int32_t value_id) {
    const int lane = lane_id();
    const int place = bit_count(warp_ballot(lane < kept && id >= 0 && v >= value));
    const float up_v = warp_get_up(v, 1);
    const int32_t up_id = warp_get_up(id, 1);
    if (lane < kept && lane > place) {
      v = up_v;
      id = up_id;
    } else if (lane == place) {
      v = value;
      id = value_id;
    }
    bar = warp_get(v, kept - 1);
  }

  // Takes every value above the bar out of a slice whose maximum over the warp is `best`.
  template <int kN>
  UNMASK_DEVICE void take(int kept, float (&x)[kN], float best, int32_t base) {
    while (best > bar) {
      int mine = kN;
      float exact = best;  // -0 and +0 tie; report the one that is there
#pragma unroll
      for (int k = kN - 1; k >= 0; --k) {
        mine = x[k] == best ? k : mine;
        exact = x[k] == best ? x[k] : exact;
      }
      const uint32_t key = mine < kN ? static_cast<uint32_t>(slice_id(mine, lane_id())) : 0xFFFFFFFFu;
      const int lowest = static_cast<int>(warp_min_u32(key));
      const int owner = lane_of(lowest);
      insert(kept, warp_get(exact, owner), base + lowest);
      if (lane_id() == owner) set_marked(x, 1u << mine, neg_inf());
      best = warp_max(lane_max(x));
    }
  }
};

// The lowest id among the lanes whose value equals the warp's best; the lane that holds it. id < 0 = none.
UNMASK_DEVICE int best_lane(float v, int32_t id, float best) {
  const uint32_t key = id >= 0 && v == best ? static_cast<uint32_t>(id) : 0xFFFFFFFFu;
  const uint32_t lowest = warp_min_u32(key);
  if (lowest == 0xFFFFFFFFu) return -1;
  return lowest_bit(warp_ballot(key == lowest));
}

UNMASK_DEVICE Sample warp_best(const Sample& mine) {
  const int lane = best_lane(mine.score, mine.id, warp_max(mine.score));
  if (lane < 0) return {neg_inf(), -1, neg_inf()};
  return {warp_get(mine.score, lane), warp_get(mine.id, lane), warp_get(mine.x, lane)};
}

struct NoiseKey {
  uint64_t seed;
  uint32_t step, pos;
};

// Best noisy score of this lane; `best` is the slice's maximum over the warp.
struct LaneSample {
  Sample mine = {neg_inf(), -1, neg_inf()};
  float bar = neg_inf();  // best score of the warp so far

  template <int kN>
  UNMASK_DEVICE void add(const float (&x)[kN], float best, float temperature, const NoiseKey& key, int32_t base) {
    if (!(noisy_score(temperature, kGumbelMax, best) > bar)) return;
#pragma unroll
    for (int k = 0; k < kN; k += 4) {
      const float top = max_drop_nan(max_drop_nan(x[k], x[k + 1]), max_drop_nan(x[k + 2], x[k + 3]));
      if (!(noisy_score(temperature, kGumbelMax, top) > max_drop_nan(mine.score, bar))) continue;
      const int32_t id = base + slice_id(k, lane_id());
      const Philox4 words = philox(key.seed, static_cast<uint32_t>(id) >> 2, key.pos, key.step, 0u);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float score =
            noisy_score(temperature, gumbel_from_bits(philox_word(words, static_cast<uint32_t>(j))), x[k + j]);
        if (score > mine.score) mine = {score, id + j, x[k + j]};
      }
    }
    bar = warp_max(mine.score);
  }
};

// ---- first launch: every group of chunks on its own ---------------------------------------------------------------
// kAhead: slices in flight, 8 registers (fp32: 16) and 1 KB (2 KB) a warp each, twice that with guidance.
template <FloatType kType, bool kSampled, bool kGuided, int kAhead>
struct GroupScan {
  using Bits = typename Element<kType>::Bits;
  const StatsJob& job;
  int64_t entry;
  const Bits *row, *null_row;
  uint32_t *forbid_marks, *suppress_marks;
  NoiseKey key = {0, 0, 0};
  TopList top;
  LaneSample sample;
  bool nan = false;

  UNMASK_DEVICE Loaded<kType, kGuided> load(int64_t first, int slice) const {
    const StatsInputs& in = job.in;
    Loaded<kType, kGuided> all;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t i = first + slice * kSliceIds + half * 256 + lane_id() * kRun;
      all.run[half] = load_run<kType>(row, in.col_stride, job.dense, i, in.count);
      if constexpr (kGuided) all.run[2 + half] = load_run<kType>(null_row, in.null_col_stride, job.dense, i, in.count);
    }
    return all;
  }

  UNMASK_DEVICE SumExp chunk(int64_t first) {
    Loaded<kType, kGuided> next[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) next[a] = load(first, a);
    const StatsInputs& in = job.in;
    const int64_t base = in.offset + first, n = in.count - first < kStatsChunk ? in.count - first : kStatsChunk;
    const bool forbidden = mark_ids(job.forbid, base, n, forbid_marks);
    const bool suppressed = mark_ids(job.suppress, base, n, suppress_marks);
    const bool biased = bias_in(in, entry, base, n);
    LaneSum sum;
    for (int s = 0; s < kSlices; s += kAhead) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int slice = s + a;
        const int32_t slice_base = static_cast<int32_t>(base + slice * kSliceIds);
        float x[kSliceValues];
#pragma unroll
        for (int k = 0; k < kSliceValues; ++k) x[k] = next[a].get(k, in.guidance);
        if (slice + kAhead < kSlices) next[a] = load(first, slice + kAhead);
        if constexpr (kGuided) {  // behind the last column u + w (c - u) of two -inf is NaN
          const int64_t there = n - slice * kSliceIds;
          if (there < kSliceIds) {
#pragma unroll
            for (int k = 0; k < kSliceValues; ++k) x[k] = slice_id(k, lane_id()) < there ? x[k] : neg_inf();
          }
        }
        if (biased) add_bias(in, entry, slice_base, n - slice * kSliceIds, x);
        if (suppressed) set_marked(x, lane_marks(suppress_marks, slice), neg_inf());
        float best = warp_max(lane_max(x));
        if (best > sum.m) sum.raise(best);
        sum.add(x);
        if (forbidden) {  // stays in the sum, cannot win
          set_marked(x, lane_marks(forbid_marks, slice), neg_inf());
          best = warp_max(lane_max(x));
        }
        if constexpr (kSampled) sample.add(x, best, in.temperature, key, slice_base);
        top.take(in.kept, x, best, slice_base);
      }
    }
    nan = nan || sum.nan || sum.r != sum.r;
    return {sum.m, warp_sum(sum.n) - 1.0f + warp_sum(sum.r), warp_sum(sum.t)};
  }
};

// One warp's group of chunks, to the workspace. False for an entry without a row: its outputs are written without any partial result.
template <FloatType kType, bool kSampled, bool kGuided, int kAhead>
UNMASK_DEVICE bool scan_group(const StatsJob& job, int64_t local, int64_t group, uint32_t (&marks)[2][kMarkWords]) {
  const int64_t entry = job.entry_begin + local, row = row_of(job, entry);
  if (!row_exists(job, row)) return false;
  const StatsInputs& in = job.in;
  using Bits = typename Element<kType>::Bits;
  const Bits* null_row = nullptr;
  if constexpr (kGuided) null_row = static_cast<const Bits*>(in.null_logits) + row * in.null_row_stride;
  GroupScan<kType, kSampled, kGuided, kAhead> scan{
      job, entry, static_cast<const Bits*>(in.logits) + row * in.row_stride, null_row, marks[0], marks[1]};
  if constexpr (kSampled) {
    scan.key = {static_cast<uint64_t>(in.seed[entry * in.seed_stride]),
                static_cast<uint32_t>(in.step[entry * in.step_stride]),
                static_cast<uint32_t>(in.pos[entry * in.pos_stride])};
  }
  const int64_t end = (group + 1) * job.group_chunks < job.chunks ? (group + 1) * job.group_chunks : job.chunks;
  for (int64_t c = group * job.group_chunks; c < end; ++c) {
    const SumExp sum = scan.chunk(c * kStatsChunk);
    if (lane_id() == 0) job.sums[local * job.chunks + c] = sum;
  }
  GroupBest& out = job.best[local * job.groups + group];
  const bool nan = warp_ballot(scan.nan) != 0;
  if (lane_id() < in.kept) out.top[lane_id()] = {scan.top.v, scan.top.id};
  if constexpr (kSampled) {
    const Sample best = warp_best(scan.sample.mine);
    if (lane_id() == 0) out.sample = best;
  }
  if (lane_id() == 0) out.status = nan ? kStatusNaN : kStatusOk;
  return true;
}

// Guided, one slice and its null slice are in flight; fp32 holds 32 registers of them, for which one block an SM less makes room.
template <FloatType kType, bool kSampled, bool kGuided>
UNMASK_KERNEL_BOUNDS(kWarpsPerBlock * 32, kGuided ? 3 : 4)
stats_scan(const StatsJob job) {
  __shared__ uint32_t marks[kWarpsPerBlock][2][kMarkWords];
  const int64_t unit = block_index() * kWarpsPerBlock + warp_in_block();
  if (unit / job.groups >= job.entries) return;
  scan_group<kType, kSampled, kGuided, kType == FloatType::f32 || kGuided ? 1 : 2>(
      job, unit / job.groups, unit % job.groups, marks[warp_in_block()]);
}

}  // namespace unmask::cuda
