// commit on CUDA: one warp per entry; tests run this code on emulated warps (tests/emulate_warp.h).
//
// A candidate's place in the commit order (score desc, position asc) is the number of live candidates that come before it, so no sort
// and no limit on their number: with n candidates n^2 / 32 comparisons a lane, which for the 32 to 128 of a block is a microsecond or two
// of arithmetic on values in shared memory (a bitonic sort of 128 in one warp has 28 dependent exchanges, each as long as eight of these
// comparisons, and then needs the inverse permutation). Every rule then is one warp-wide minimum or count over (place, score).
//
//   classify  live / edit / neither, one byte per candidate (in `committed`, whose final bytes are written last)
//   unique    only if positions do not rise: of several candidates for one position all but the best are dropped
//   place     place[i] = live candidates before i
//   count     how many commit, by the rule
//   write     canvas, masked, committed; then what is left is counted
//
// Bytes: 34 to 54 a candidate, read twice at most; 64 rows x 128 candidates are 0.4 MB, so latency decides: about six dependent reads.
// Entries on the same canvas row run one after the other in the first one's warp, in order, as on the CPU.
#pragma once
#include "common/commit_params.h"
#include "common/online.h"
#include "cuda/common/warp.cuh"

namespace unmask::cuda {

constexpr uint8_t kLive = 1, kEdit = 2, kDropped = 4;
constexpr int kCommitWarps = 1;  // per block: few entries, spread over the SMs
constexpr int kStaged = 256;  // candidates of an entry up to which they are compared in shared memory
constexpr int kOwn = 4;  // of a lane's candidates at a time
constexpr int64_t kCommitSharedBytes = kCommitWarps * 2 * kStaged * 8;

struct CommitJob {
  CommitParams c;
  uint8_t* state;  // [candidates]: the bytes of `committed`
  int32_t* place;  // [candidates]
  int32_t* order;  // [candidates], for rule ENTROPY_BOUND only: candidate at each place
};

UNMASK_DEVICE int64_t warp_sum_i64(int64_t v) {
  for (int mask = 16; mask > 0; mask >>= 1) v = v + warp_get_xor(v, mask);
  return v;
}
UNMASK_DEVICE int64_t warp_min_i64(int64_t v) {
  for (int mask = 16; mask > 0; mask >>= 1) {
    const int64_t other = warp_get_xor(v, mask);
    v = other < v ? other : v;
  }
  return v;
}
struct CommitEntry {
  const CommitJob& job;
  const CommitParams& c;
  int64_t entry, begin, end, row;

  // Runs f(i) for this lane's candidates.
  template <class F>
  UNMASK_DEVICE void each(const F& f) const {
    for (int64_t i = begin + lane_id(); i < end; i += 32) f(i);
  }

  UNMASK_DEVICE bool positions_fit() const {
    bool bad = false;
    each([&](int64_t i) { bad = bad || c.pos[i] < 0 || c.pos[i] >= c.length; });
    return warp_ballot(bad) == 0;
  }

  UNMASK_DEVICE int32_t classify() const {
    bool nan = false;
    each([&](int64_t i) {
      const int64_t pos = c.pos[i], token = c.token[i];
      const bool masked = c.masked_at(row, pos);
      const bool wanted = masked ? !c.eligible || c.eligible[i] : c.editable && c.editable[i];
      uint8_t state = 0;
      if (wanted && token >= 0) {
        const double score = c.score[i], cost = c.cost_of(i);
        if (score != score || (masked && cost != cost)) nan = true;
        else if (masked) state = kLive;
        else if (token != c.canvas_at(row, pos) && score > c.edit_threshold) state = kEdit;
      }
      job.state[i] = state;
    });
    warp_sync();
    return warp_ballot(nan) != 0 ? kStatusNaNScore : kStatusOk;
  }

  // Of candidates for one position only the best stays: highest score, then lowest token, then first. A candidate that is already
  // dropped still drops what it beats: whatever beats it does so too.
  UNMASK_DEVICE void keep_best_per_position() const {
    bool rising = true;
    each([&](int64_t i) { rising = rising && (i == begin || c.pos[i - 1] < c.pos[i]); });
    if (warp_ballot(!rising) == 0) return;
    each([&](int64_t i) {
      const uint8_t kind = job.state[i] & (kLive | kEdit);
      if (kind == 0) return;
      const int64_t pos = c.pos[i], token = c.token[i];
      const double score = c.score[i];
      bool beaten = false;
      for (int64_t j = begin; j < end && !beaten; ++j) {
        if (j == i || (job.state[j] & kind) == 0 || c.pos[j] != pos) continue;
        const double other = c.score[j];
        beaten = other != score ? other > score : c.token[j] != token ? c.token[j] < token : j < i;
      }
      if (beaten) job.state[i] = kind | kDropped;
    });
    warp_sync();
  }

  // Fills place[] (and order[]); returns how many live candidates there are.
  UNMASK_DEVICE int64_t place_candidates() const {
    const int64_t n = end - begin;
    if (n <= kStaged) place_staged(static_cast<int>(n));
    else place_any();
    warp_sync();
    int64_t live = 0;
    each([&](int64_t i) { live += job.state[i] == kLive; });
    return warp_sum_i64(live);
  }

  UNMASK_DEVICE void set_place(int64_t i, int32_t before) const {
    job.place[i] = before;
    if (job.order != nullptr) job.order[begin + before] = static_cast<int32_t>(i - begin);
  }

  UNMASK_DEVICE void place_any() const {
    each([&](int64_t i) {
      if (job.state[i] != kLive) return;
      const int64_t pos = c.pos[i];
      const double score = c.score[i];
      int32_t before = 0;
      for (int64_t j = begin; j < end; ++j) {
        const double other = c.score[j];
        const bool first = other != score ? other > score : c.pos[j] < pos;
        before += job.state[j] == kLive && first;
      }
      set_place(i, before);
    });
  }

  // The same from shared memory: every lane compares kOwn of its candidates with each candidate in turn, one broadcast read for all.
  UNMASK_DEVICE void place_staged(int n) const {
    auto* score =
        reinterpret_cast<double*>(dynamic_shared()) + warp_in_block() * 2 * kStaged;  // NaN: not live, before nobody
    auto* pos = reinterpret_cast<int64_t*>(score + kStaged);
    for (int i = lane_id(); i < n; i += 32) {
      score[i] = job.state[begin + i] == kLive ? c.score[begin + i] : static_cast<double>(quiet_nan());
      pos[i] = c.pos[begin + i];
    }
    warp_sync();
    for (int first = lane_id(); first < n; first += 32 * kOwn) {
      double mine[kOwn];
      int64_t at[kOwn];
      int32_t before[kOwn] = {};
#pragma unroll
      for (int k = 0; k < kOwn; ++k) {
        const int i = first + 32 * k < n ? first + 32 * k : first;
        mine[k] = score[i], at[k] = pos[i];
      }
      for (int j = 0; j < n; ++j) {
        const double other = score[j];
        const int64_t other_at = pos[j];
#pragma unroll
        for (int k = 0; k < kOwn; ++k) before[k] += other > mine[k] || (other == mine[k] && other_at < at[k]);
      }
#pragma unroll
      for (int k = 0; k < kOwn; ++k)
        if (first + 32 * k < n && mine[k] == mine[k]) set_place(begin + first + 32 * k, before[k]);
    }
  }

  // The lowest place whose candidate fails, `live` if none does.
  template <class F>
  UNMASK_DEVICE int64_t first_failure(int64_t live, const F& fails) const {
    int64_t lowest = live;
    each([&](int64_t i) {
      if (job.state[i] == kLive && job.place[i] < lowest && fails(job.place[i], c.score[i])) lowest = job.place[i];
    });
    return warp_min_i64(lowest);
  }

  // The rules of common/commit_rules.h, which reads a sorted array where this reads places; the same double arithmetic.
  UNMASK_DEVICE int64_t how_many(int64_t live) const {
    if (c.rule == kRuleQuota) return c.quota[entry] < live ? c.quota[entry] : live;
    if (live == 0) return 0;
    int64_t n = 0;
    if (c.by_threshold()) {
      const double bar = c.threshold[entry];
      const bool strict = c.rule == kRuleThresholdStrict;
      n = first_failure(live, [&](int64_t, double score) { return !(strict ? score > bar : score >= bar); });
    } else if (c.rule == kRuleFactor) {
      n = first_failure(
          live, [&](int64_t k, double score) { return !(static_cast<double>(k + 2) * (1.0 - score) < c.param); });
    } else if (c.rule == kRuleFactorAuthors) {
      n = first_failure(
          live, [&](int64_t k, double score) { return k > 0 && score < 1.0 - c.param / static_cast<double>(k + 2); });
      if (n == live - 1) n = live;
    } else {
      n = entropy_bound(live);
    }
    return n > 0 ? n : 1;
  }

  // A running sum in order, as on the CPU: every lane does the same additions.
  UNMASK_DEVICE int64_t entropy_bound(int64_t live) const {
    int64_t best = 1;
    double sum = 0.0, largest = 0.0;
    for (int64_t k = 0; k < live; ++k) {
      const double cost = c.cost_of(begin + job.order[begin + k]);
      sum += cost;
      largest = k == 0 || cost > largest ? cost : largest;
      if (sum - largest <= c.param) best = k + 1;
    }
    return best;
  }

  UNMASK_DEVICE void write(int64_t n) const {
    each([&](int64_t i) {
      const uint8_t state = job.state[i];
      const bool decided = state == kLive && job.place[i] < n, edited = state == kEdit;
      if (decided || edited) c.canvas_at(row, c.pos[i]) = c.token[i];
      if (decided) c.masked_at(row, c.pos[i]) = false;
      c.committed[i] = decided || edited;
    });
    warp_sync();
    int64_t left = 0;
    each([&](int64_t i) { left += c.masked_at(row, c.pos[i]); });
    left = warp_sum_i64(left);
    if (lane_id() == 0) {
      c.count[entry] = n;
      c.left[entry] = left;
    }
  }

  UNMASK_DEVICE int32_t run() const {
    int32_t bits = !row_fits(c, row) ? kStatusBadRow : !positions_fit() ? kStatusBadSlot : rule_fault(c, entry);
    if (bits != kStatusOk) {
      each([&](int64_t i) { c.committed[i] = false; });
      return bits;
    }
    bits = classify();
    keep_best_per_position();
    write(how_many(place_candidates()));
    return bits;
  }
};

// What the offsets say of one entry. It owns its candidates if it begins at or after every bound before it and ends inside of the list.
struct Ownership {
  bool owned = false;
  int64_t covered_before = 0, covered = 0;  // end of the last candidate that entries before it, and with it, own
};

UNMASK_DEVICE Ownership find_ownership(const CommitParams& c, int64_t entry) {
  Ownership out;
  int64_t reached = 0, covered = 0;  // highest bound, and end of what is owned, before this step
  for (int64_t first = 0; first <= entry; first += 32) {
    const int64_t b = first + lane_id();
    const bool there = b <= entry;
    const int64_t begin = there ? c.cu[b] : 0, end = there ? c.cu[b + 1] : 0;
    const int64_t top = prefix_max(begin > reached ? begin : reached);
    const bool owned = there && begin >= top && begin <= end && end <= c.candidates;
    const int64_t covers = prefix_max(owned && end > covered ? end : covered);
    const int64_t before = warp_get_up(covers, 1);
    const int last = static_cast<int>(entry - first < 31 ? entry - first : 31);
    out.owned = warp_get(static_cast<int32_t>(owned), last) != 0;
    out.covered_before = last == 0 ? covered : warp_get(before, last);
    out.covered = warp_get(covers, last);
    reached = warp_get(top, 31), covered = warp_get(covers, 31);
  }
  return out;
}

UNMASK_DEVICE void leave_out(const CommitParams& c, int64_t begin, int64_t end) {
  for (int64_t i = begin + lane_id(); i < end; i += 32) c.committed[i] = false;
}

// Also answers for candidates that no entry owns: those before an owned entry, and the last entry for those behind all.
UNMASK_DEVICE void commit_entry(const CommitJob& job, int64_t entry) {
  const CommitParams& c = job.c;
  const int64_t begin = c.cu[entry], end = c.cu[entry + 1], row = c.row[entry];
  const Ownership own = find_ownership(c, entry);
  if (lane_id() == 0) c.count[entry] = c.left[entry] = 0;
  if (own.owned) leave_out(c, own.covered_before, begin);
  if (entry == c.entries - 1) leave_out(c, own.covered, c.candidates);
  warp_sync();
  int32_t bits = kStatusOk;
  if (!own.owned) bits = kStatusBadSegment;
  else if (row != -1) bits = CommitEntry{job, c, entry, begin, end, row}.run();
  else leave_out(c, begin, end);
  if (bits != kStatusOk && c.status && lane_id() == 0) c.status[entry] |= bits;
  warp_sync();
}

UNMASK_KERNEL_BOUNDS(kCommitWarps * 32, 1) commit_entries(const CommitJob job) {
  const CommitParams& c = job.c;
  const int64_t entry = block_index() * kCommitWarps + warp_in_block();
  if (entry >= c.entries) return;
  const int64_t row = c.row[entry];
  bool taken = false;  // an earlier entry's warp does this row
  for (int64_t b = lane_id(); b < entry; b += 32) taken = taken || (row >= 0 && c.row[b] == row);
  if (warp_ballot(taken) != 0) return;
  commit_entry(job, entry);
  for (int64_t b = entry + 1; row >= 0 && b < c.entries; ++b)
    if (c.row[b] == row) commit_entry(job, b);
}

}  // namespace unmask::cuda
