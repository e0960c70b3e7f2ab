// logit_stats on CUDA, second step: one warp folds the partial results of one entry, in order, and writes its outputs or its state.
// Formula and layout: logit_stats.cuh and csrc/common/online.h; the kernels: logit_stats_kernels.cuh.
#pragma once
#include "cuda/logit_stats.cuh"

namespace unmask::cuda {

// State of one entry spread over the warp: everything is the same in every lane, except that lane i holds the i-th
// candidate.
struct WarpState {
  int32_t next = 0, kept = 2, status = 0;
  SumExp sum = empty_sum();
  Sample sample = {neg_inf(), -1, neg_inf()};
  TopList top;
};

// A row of the int32 state tensor (StatsState), with any strides.
struct StateRow {
  int32_t* words;
  int64_t stride;
  static constexpr int kSum = 3, kSample = 6, kTop = 9;  // first words; tests compare them with StatsState

  UNMASK_DEVICE int32_t word(int i) const { return words[i * stride]; }
  UNMASK_DEVICE float value(int i) const { return float_of_bits(static_cast<uint32_t>(word(i))); }
  UNMASK_DEVICE void set(int i, int32_t w) const { words[i * stride] = w; }
  UNMASK_DEVICE void set(int i, float v) const { words[i * stride] = static_cast<int32_t>(bits_of_float(v)); }

  UNMASK_DEVICE WarpState load() const {
    WarpState st;
    st.next = word(0);
    st.kept = word(1);
    st.status = word(2);
    st.sum = {value(kSum), value(kSum + 1), value(kSum + 2)};
    st.sample = {value(kSample), word(kSample + 1), value(kSample + 2)};
    if (lane_id() < kTopMax) {
      st.top.v = value(kTop + 2 * lane_id());
      st.top.id = word(kTop + 2 * lane_id() + 1);
    }
    const int last = st.kept < 1 ? 0 : st.kept > kTopMax ? kTopMax - 1 : st.kept - 1;
    st.top.bar = warp_get(st.top.v, last);
    return st;
  }
  UNMASK_DEVICE void store(const WarpState& st) const {
    warp_sync();  // every lane has read what it needs
    if (lane_id() == 0) {
      set(0, st.next);
      set(1, st.kept);
      set(2, st.status);
      set(kSum, st.sum.m);
      set(kSum + 1, st.sum.r);
      set(kSum + 2, st.sum.t);
      set(kSample, st.sample.score);
      set(kSample + 1, st.sample.id);
      set(kSample + 2, st.sample.x);
    }
    if (lane_id() < kTopMax) {
      set(kTop + 2 * lane_id(), st.top.v);
      set(kTop + 2 * lane_id() + 1, st.top.id);
    }
  }
};

// Lists that hold an id outside the vocabulary.
UNMASK_DEVICE int32_t list_status(const StatsJob& job) {
  bool bad = false;
  for (int64_t i = lane_id(); i < job.forbid.n; i += 32)
    bad = bad || job.forbid.ids[i * job.forbid.stride] >= job.in.vocab;
  for (int64_t i = lane_id(); i < job.suppress.n; i += 32)
    bad = bad || job.suppress.ids[i * job.suppress.stride] >= job.in.vocab;
  return warp_ballot(bad) != 0 ? kStatusBadId : kStatusOk;
}
UNMASK_DEVICE int32_t bias_status(const StatsInputs& in, int64_t entry) {
  bool bad = false;
  for (int64_t j = lane_id(); j < in.n_bias; j += 32) bad = bad || bias_id(in, entry, j) >= in.vocab;
  return warp_ballot(bad) != 0 ? kStatusBadId : kStatusOk;
}

// Logits at the entry's ids that lie in this range of the vocabulary, as the softmax sees them -> out[i * stride].
UNMASK_DEVICE int32_t gather_ids(const StatsJob& job, int64_t entry, int64_t row, float* out, int64_t stride) {
  const StatsInputs& in = job.in;
  bool bad = false;
  for (int64_t i = lane_id(); i < in.n_ids; i += 32) {
    const int64_t id = in.ids[entry * in.ids_stride[0] + i * in.ids_stride[1]];
    bad = bad || id >= in.vocab;
    if (id < in.offset || id >= in.offset + in.count) continue;
    float v = load_logit(in, row, id - in.offset);
    for (int64_t j = 0; j < in.n_bias; ++j) {
      if (bias_id(in, entry, j) == id) v = v + bias_value(in, entry, j);
    }
    for (int64_t j = 0; j < job.suppress.n; ++j) {
      if (job.suppress.ids[j * job.suppress.stride] == id) v = neg_inf();
    }
    out[i * stride] = v;
  }
  return warp_ballot(bad) != 0 ? kStatusBadId : kStatusOk;
}

// The same from job.id_logit, which has a value for every id of the vocabulary.
UNMASK_DEVICE int32_t take_ids(const StatsJob& job, int64_t entry, float* out) {
  const StatsInputs& in = job.in;
  bool bad = false;
  for (int64_t i = lane_id(); i < in.n_ids; i += 32) {
    const int64_t id = in.ids[entry * in.ids_stride[0] + i * in.ids_stride[1]];
    bad = bad || id >= in.vocab;
    if (id >= 0 && id < in.vocab) out[2 * i] = job.id_logit[(entry - job.entry_begin) * in.n_ids + i];
  }
  return warp_ballot(bad) != 0 ? kStatusBadId : kStatusOk;
}

UNMASK_DEVICE void fold_partials(const StatsJob& job, int64_t entry, WarpState* st) {
  const int64_t local = entry - job.entry_begin;
  const int kept = job.in.kept, lane = lane_id();
  if (job.tree) {
    // Every lane the partials next to each other, then neighbours: 5 + 5 dependent merges for 132 partials instead of 132.
    const int64_t each = (job.chunks + 31) / 32;
    SumExp mine = empty_sum();
    for (int64_t i = 0; i < each; ++i) {
      const int64_t c = lane * each + i;
      if (c < job.chunks) mine = merge_sum(mine, job.sums[local * job.chunks + c]);
    }
    for (int by = 1; by < 32; by <<= 1) {
      const int from = (lane + by) & 31;
      const SumExp right = {warp_get(mine.m, from), warp_get(mine.r, from), warp_get(mine.t, from)};
      if (lane % (2 * by) == 0) mine = merge_sum(mine, right);
    }
    st->sum = merge_sum(st->sum, {warp_get(mine.m, 0), warp_get(mine.r, 0), warp_get(mine.t, 0)});
  }
  // Sums: strictly left to right. Lanes fetch 32 at a time, every lane does the same merges.
  for (int64_t c = 0; !job.tree && c < job.chunks; c += 32) {
    SumExp mine = empty_sum();
    if (c + lane < job.chunks) mine = job.sums[local * job.chunks + c + lane];
    const int n = job.chunks - c < 32 ? static_cast<int>(job.chunks - c) : 32;
    for (int i = 0; i < n; ++i)
      st->sum = merge_sum(st->sum, {warp_get(mine.m, i), warp_get(mine.r, i), warp_get(mine.t, i)});
  }
  // Candidates: each lane offers the best that is left in its group's list; 32 groups, whose ids rise, at a time.
  uint32_t status = 0;
  Sample sampled = {neg_inf(), -1, neg_inf()};
  for (int64_t g = 0; g < job.groups; g += 32) {
    const bool have = g + lane < job.groups;
    const GroupBest* group = job.best + local * job.groups + g + (have ? lane : 0);
    Cand head = have ? group->top[0] : no_cand();
    int used = 1;
    if (have) status |= static_cast<uint32_t>(group->status);
    if (have && job.in.temperature > 0.0f && beats(group->sample, sampled)) sampled = group->sample;
    for (;;) {
      const float best = warp_max(head.v);
      if (!(best > st->top.bar)) break;
      const int winner = best_lane(head.v, head.id, best);
      st->top.insert(kept, warp_get(head.v, winner), warp_get(head.id, winner));
      if (lane == winner) {
        head = used < kept ? group->top[used] : no_cand();
        ++used;
      }
    }
  }
  st->status |= static_cast<int32_t>(warp_or_u32(status));
  if (job.in.temperature > 0.0f) {
    const Sample best = warp_best(sampled);
    if (beats(best, st->sample)) st->sample = best;
  } else {
    const float v = warp_get(st->top.v, 0);
    st->sample = {v, warp_get(st->top.id, 0), v};
  }
}

UNMASK_DEVICE void write_outputs(const StatsOutputs& out, int64_t entry, const WarpState& st) {
  StatsState whole;
  whole.next = st.next;
  whole.status = st.status;
  whole.sum = st.sum;
  whole.sample = st.sample;
  for (int i = 0; i < 2; ++i) whole.top[i] = {warp_get(st.top.v, i), warp_get(st.top.id, i)};
  const EntryStats r = finish_stats(whole);
  const bool none = st.next == 0, valid = !none && !is_invalid(r.status);
  if (lane_id() == 0) out.write(entry, r);
  for (int64_t i = lane_id(); i < out.n_ids; i += 32) {
    float* at = out.at_ids(entry) + 2 * i;
    if (!valid) at[1] = none ? 0.0f : quiet_nan();
    at[0] = valid ? log_probability(at[1], st.sum) : at[1];
  }
  if (lane_id() < out.topk) {
    const bool there = valid && lane_id() < st.kept;
    out.topk_id(entry)[lane_id()] = there ? st.top.id : -1;
    out.topk_logit(entry)[lane_id()] = there ? st.top.v : neg_inf();
  }
}

UNMASK_DEVICE int64_t entry_of_warp() { return block_index() * kWarpsPerBlock + warp_in_block(); }

UNMASK_DEVICE void finish_entry(const StatsJob& job, const StatsOutputs& out, int64_t entry) {
  const int64_t row = row_of(job, entry);
  WarpState st;
  st.kept = job.in.kept;
  if (row_exists(job, row)) {
    st.next = static_cast<int32_t>(job.in.vocab);
    st.status = list_status(job) | bias_status(job.in, entry);
    fold_partials(job, entry, &st);
    float* logit = out.at_ids(entry) + 1;
    for (int64_t i = lane_id(); i < out.n_ids; i += 32) logit[2 * i] = neg_inf();
    st.status |= job.id_logit == nullptr ? gather_ids(job, entry, row, logit, 2) : take_ids(job, entry, logit);
  } else if (row != -1) {
    st.next = 1;
    st.status = kStatusBadRow;
  }
  write_outputs(out, entry, st);
}

}  // namespace unmask::cuda
