// The LM head fused with logit_stats on Hopper (sm_90a), up to 64 rows; bf16 and fp16. tests run this code on emulated warps.
//
// Formula: logits = W X^T, rounded to the weights' dtype as a GEMM would store them, then csrc/common/online.h. "Swap AB": 64 ids are the M
// of a product and the tokens its N (32 or 64), so that no row of a tile is padding and W is read once, as it lies.
// Bytes: W once, 2 V d; X (256 KB at d = 4,096, 32 tokens) once per tile from L2; partial results 92 B x tokens x blocks. FLOPs 2 V d tokens:
// 32 to 64 FLOP/B, memory-bound. At V = 126,464, d = 4,096: 1.04 GB, 241 us at 4.3 TB/s.
// Work split: one block a multiprocessor, persistent; it takes neighbouring units of 64 ids (15 of 1,976 at V = 126,464: 99.8% of an even
// share), in tiles of up to 3 units, one a warpgroup. A 13th warp asks for tiles; it runs up to 8 stages ahead, also while the others
// reduce. Registers a thread: 16 or 32 of accumulators.
// Layout of a stage: three tiles of 64 ids x 64 elements of W, one of tokens x 64 of X, all K-major with the 128-byte swizzle.
// Reduction: a tile's logits go through shared memory as [token][id]; a warp takes tokens warp, warp + 12, ...; each lane of the first 24 has
// 8 neighbouring ids. What a token's ids gave so far lies in the workspace (the same warp comes back to it); head_fold ends the call.
#pragma once
#include "cuda/common/hopper.cuh"
#include "cuda/head_stats_plan.h"
#include "cuda/logit_stats_fold.cuh"

namespace unmask::cuda {

// stats.in has no logits; chunks = groups = blocks, tree. Maps: W [d, V] in boxes of 64 x 64, X [d, T'] in boxes of 64 x tokens.
struct HeadJob {
  TensorMap weight, hidden;
  StatsJob stats;
  float* id_logit;  // stats.id_logit, to write
  int64_t width, units;
  int stages;
};

// The rows asked for, next to each other; zeros for an entry without one. One warp an entry; 16 bytes a lane.
struct GatherJob {
  const char* from;
  char* to;
  const int64_t* rows;
  int64_t rows_stride, n_rows, row_bytes, from_stride;  // bytes, but rows_stride
};
UNMASK_KERNEL_BOUNDS(128, 1) gather_rows(const GatherJob g) {
  const int64_t entry = block_index(), row = g.rows[entry * g.rows_stride];
  const bool there = row >= 0 && row < g.n_rows;
  for (int64_t i = (warp_in_block() * 32 + lane_id()) * 16; i < g.row_bytes; i += 128 * 16) {
    Vec16 x{};
    if (there) x = load16(g.from + row * g.from_stride + i);
    store16(g.to + entry * g.row_bytes + i, x);
  }
}

template <int kTokens>
struct HeadStages {
  static constexpr int kUnitBytes = kHeadUnit * kAtomRow, kBytes = kHeadUnits * kUnitBytes + kTokens * kAtomRow;
  char* memory;
  int count;

  UNMASK_DEVICE char* unit(int stage, int u) const { return memory + stage * kBytes + u * kUnitBytes; }
  UNMASK_DEVICE char* tokens(int stage) const { return unit(stage, kHeadUnits); }
  UNMASK_DEVICE uint64_t* full(int stage) const {
    return reinterpret_cast<uint64_t*>(memory + count * kBytes) + 2 * stage;
  }
  UNMASK_DEVICE uint64_t* empty(int stage) const { return full(stage) + 1; }
  UNMASK_DEVICE uint16_t* logits() const {  // [kTokens][kHeadLogitStride]
    return reinterpret_cast<uint16_t*>(memory + count * kBytes + kHeadMostStages * 16);
  }
  UNMASK_DEVICE uint32_t* marks() const {  // of each warp: forbidden, suppressed
    return reinterpret_cast<uint32_t*>(logits() + kTokens * kHeadLogitStride);
  }
};

template <FloatType kType, int kTokens, bool kSampled>
class HeadBlock {
 public:
  using Stages = HeadStages<kTokens>;

  UNMASK_DEVICE HeadBlock(const HeadJob& h, char* shared)
      : h_(h),
        stages_{shared, h.stages},
        units_(head_units(block_index(), h.stats.groups, h.units)),
        steps_(static_cast<int>((h.width + kHeadStep - 1) / kHeadStep)) {}

  UNMASK_DEVICE const Stages& stages() const { return stages_; }

  // One thread.
  UNMASK_DEVICE void ask() {
    RingPlace at;
    for (int64_t unit = units_.first; unit < units_.end; unit += kHeadUnits) {
      const int count = static_cast<int>(units_.end - unit < kHeadUnits ? units_.end - unit : kHeadUnits);
      for (int step = 0; step < steps_; ++step) {
        barrier_wait(stages_.empty(at.slot), at.phase ^ 1u);
        uint64_t* full = stages_.full(at.slot);
        barrier_arrive_expecting(full, count * Stages::kUnitBytes + kTokens * kAtomRow);
        copy_box(stages_.tokens(at.slot), &h_.hidden, step * kHeadStep, 0, full);
        for (int u = 0; u < count; ++u)
          copy_box(stages_.unit(at.slot, u), &h_.weight, step * kHeadStep, static_cast<int>((unit + u) * kHeadUnit),
                   full);
        at.advance(stages_.count);
      }
    }
  }

  // Three warpgroups.
  UNMASK_DEVICE void run() {
    const int group = warp_in_block() / 4;
    RingPlace at;
    for (int64_t unit = units_.first; unit < units_.end; unit += kHeadUnits) {
      const int count = static_cast<int>(units_.end - unit < kHeadUnits ? units_.end - unit : kHeadUnits);
      if (group < count) multiply(group, at);
      else skip(at);
      group_any(kReduceBarrier, kHeadWarps * 32, false);  // the logits of all units are there
      reduce(unit * kHeadUnit, count * kHeadUnit);
      group_any(kReduceBarrier, kHeadWarps * 32, false);  // all have read them
    }
  }

 private:
  static constexpr int kReduceBarrier = 1;
  static constexpr int kValues = 8;  // ids a lane

  UNMASK_DEVICE void done_with(int stage) const {
    warp_sync();
    if (lane_id() == 0) barrier_arrive(stages_.empty(stage));
  }

  // One unit against all tokens, to shared memory.
  UNMASK_DEVICE void multiply(int unit, RingPlace& at) const {
    float c[kTokens / 8][4] = {};
    for (int step = 0; step < steps_; ++step) {
      barrier_wait(stages_.full(at.slot), at.phase);
      const uint32_t w = shared_address(stages_.unit(at.slot, unit)), x = shared_address(stages_.tokens(at.slot));
      settled(c);
      products_begin();
#pragma unroll
      for (int k = 0; k < kHeadStep / 16; ++k)
        product<kType>(c, matrix_descriptor(w + k * 32, 16), matrix_descriptor(x + k * 32, 16), true);
      products_commit();
      products_wait<0>();
      settled(c);
      done_with(at.slot);
      at.advance(stages_.count);
    }
    uint16_t* to = stages_.logits() + unit * kHeadUnit + warp_in_block() % 4 * 16 + lane_id() / 4;
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        to[(n * 8 + lane_id() % 4 * 2 + i % 2) * kHeadLogitStride + i / 2 * 8] = Element<kType>::bits(c[n][i]);
    }
  }
  UNMASK_DEVICE void skip(RingPlace& at) const {
    for (int step = 0; step < steps_; ++step) {
      barrier_wait(stages_.full(at.slot), at.phase);
      done_with(at.slot);
      at.advance(stages_.count);
    }
  }

  // Ids [base, base + n) of every token.
  UNMASK_DEVICE void reduce(int64_t base, int n) const {
    const StatsJob& job = h_.stats;
    const StatsInputs& in = job.in;
    uint32_t* forbid = stages_.marks() + warp_in_block() * 2 * kHeadMarkWords;
    uint32_t* suppress = forbid + kHeadMarkWords;
    const int64_t count = in.vocab - base < n ? in.vocab - base : n;
    const bool forbidden = mark_ids(job.forbid, base, count, forbid, kHeadMarkWords);
    const bool suppressed = mark_ids(job.suppress, base, count, suppress, kHeadMarkWords);
    for (int64_t entry = warp_in_block(); entry < job.entries; entry += kHeadWarps) {
      if (!row_exists(job, row_of(job, entry))) continue;
      const uint16_t* row = stages_.logits() + entry * kHeadLogitStride;
      float x[kValues];
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        const int at = lane_id() * kValues + k;
        x[k] = at < count ? Element<kType>::value(row[at]) : neg_inf();
      }
      const bool biased = bias_in(in, entry, base, count);
      if (biased) add_bias(in, entry, base, count, x);
      if (suppressed) set_marked(x, lane_bits(suppress), neg_inf());
      give_ids(entry, base, count, row, suppressed ? suppress : nullptr);
      add_to_state(entry, static_cast<int32_t>(base), x, forbidden ? forbid : nullptr,
                   base == units_.first * kHeadUnit);
    }
  }

  UNMASK_DEVICE static uint32_t lane_bits(const uint32_t* marks) {
    return lane_id() < kHeadIds / kValues ? marks[lane_id() / 4] >> lane_id() % 4 * 8 & 0xFFu : 0u;
  }

  // The logits at the ids asked for, as they are after bias and suppression.
  UNMASK_DEVICE void give_ids(int64_t entry, int64_t base, int64_t count, const uint16_t* row,
                              const uint32_t* suppress) const {
    const StatsInputs& in = h_.stats.in;
    for (int64_t i = lane_id(); i < in.n_ids; i += 32) {
      const int64_t id = in.ids[entry * in.ids_stride[0] + i * in.ids_stride[1]], at = id - base;
      if (at < 0 || at >= count) continue;
      float v = Element<kType>::value(row[at]);
      for (int64_t b = 0; b < in.n_bias; ++b) {
        if (bias_id(in, entry, b) == id) v = v + bias_value(in, entry, b);
      }
      if (suppress != nullptr && (suppress[at >> 5] >> (at & 31) & 1u) != 0) v = neg_inf();
      h_.id_logit[entry * in.n_ids + i] = v;
    }
    warp_sync();
  }

  UNMASK_DEVICE void add_to_state(int64_t entry, int32_t base, float (&x)[kValues], const uint32_t* forbid,
                                  bool first) const {
    const StatsJob& job = h_.stats;
    const StatsInputs& in = job.in;
    SumExp& sum_at = job.sums[entry * job.chunks + block_index()];
    GroupBest& best_at = job.best[entry * job.groups + block_index()];
    TopList top;
    SumExp before = empty_sum();
    Sample sampled = {neg_inf(), -1, neg_inf()};
    int32_t status = kStatusOk;
    if (!first) {
      before = sum_at;
      status = best_at.status;
      if constexpr (kSampled) sampled = best_at.sample;
      if (lane_id() < in.kept) top.v = best_at.top[lane_id()].v, top.id = best_at.top[lane_id()].id;
      top.bar = warp_get(top.v, in.kept - 1);
    }
    LaneSum sum;
    float best = warp_max(lane_max(x));
    if (best > sum.m) sum.raise(best);
    sum.add(x);
    const bool nan = warp_ballot(sum.nan || sum.r != sum.r) != 0;
    const SumExp here = {sum.m, warp_sum(sum.n) - 1.0f + warp_sum(sum.r), warp_sum(sum.t)};
    if (forbid != nullptr) {  // stays in the sum, cannot win
      set_marked(x, lane_bits(forbid), neg_inf());
      best = warp_max(lane_max(x));
    }
    if constexpr (kSampled) {
      LaneSample lane;
      lane.bar = sampled.score;
      lane.add(x, best, in.temperature,
               {static_cast<uint64_t>(in.seed[entry * in.seed_stride]),
                static_cast<uint32_t>(in.step[entry * in.step_stride]),
                static_cast<uint32_t>(in.pos[entry * in.pos_stride])},
               base);
      const Sample mine = warp_best(lane.mine);
      if (beats(mine, sampled)) sampled = mine;
    }
    top.take(in.kept, x, best, base);
    warp_sync();  // every lane has read the state
    if (lane_id() < in.kept) best_at.top[lane_id()] = {top.v, top.id};
    if (lane_id() == 0) {
      sum_at = merge_sum(before, here);
      best_at.status = nan ? status | kStatusNaN : status;
      if constexpr (kSampled) best_at.sample = sampled;
    }
    warp_sync();
  }

  const HeadJob& h_;
  const Stages stages_;
  const UnitRange units_;
  const int steps_;
};

template <FloatType kType, int kTokens, bool kSampled>
UNMASK_KERNEL_BOUNDS((kHeadWarps + 1) * 32, 1)
head_scan(const UNMASK_GRID_CONSTANT HeadJob h) {
  HeadBlock<kType, kTokens, kSampled> block(h, dynamic_shared());
  const bool asks = warp_in_block() == kHeadWarps;
  if (asks && lane_id() == 0) {
    prefetch_map(&h.weight);
    prefetch_map(&h.hidden);
    for (int s = 0; s < h.stages; ++s) {
      barrier_init(block.stages().full(s), 1);
      barrier_init(block.stages().empty(s), kHeadWarps);
    }
    barrier_init_done();
  }
  block_sync();
  if (!asks) block.run();
  else if (lane_id() == 0) block.ask();
}

UNMASK_KERNEL_BOUNDS(kWarpsPerBlock * 32, 4) head_fold(const StatsJob job, const StatsOutputs out) {
  if (entry_of_warp() < job.entries) finish_entry(job, out, entry_of_warp());
}

}  // namespace unmask::cuda
