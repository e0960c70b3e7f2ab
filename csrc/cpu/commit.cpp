// commit: per entry, order the live candidates by (score desc, position asc), let the rule say how many, write their tokens.
//
// An entry reads its candidates twice (classify, count what is left) and sorts them in between: n log n comparisons on 40-byte items,
// up to kInline of them on the stack. Entries run in order on the calling thread; with many candidates and canvas rows that are
// strictly increasing (so no two entries share one) they are split over threads. Nothing depends on the split.
#include <algorithm>
#include <vector>

#include "common/commit_args.h"
#include "common/register.h"
#include "common/status.h"
#include "cpu/alloc.h"
#include "cpu/parallel.h"

namespace unmask::cpu {
namespace {

constexpr int64_t kInline = 128;  // candidates per entry without heap
constexpr int64_t kParallelFrom = 4096;  // candidates per thread: ~100 us of sorting

struct Item {
  double score, cost;
  int64_t pos, token, index;
};

bool in_commit_order(const Item& a, const Item& b) { return a.score != b.score ? a.score > b.score : a.pos < b.pos; }

// Of candidates for one position only the best stays: highest score, then lowest token, then first.
int64_t keep_best_per_position(Item* items, int64_t n) {
  bool increasing = true;
  for (int64_t i = 1; i < n && increasing; ++i) increasing = items[i - 1].pos < items[i].pos;
  if (increasing) return n;
  std::sort(items, items + n, [](const Item& a, const Item& b) {
    if (a.pos != b.pos) return a.pos < b.pos;
    if (a.score != b.score) return a.score > b.score;
    return a.token != b.token ? a.token < b.token : a.index < b.index;
  });
  return std::unique(items, items + n, [](const Item& a, const Item& b) { return a.pos == b.pos; }) - items;
}

// `values` has room for n numbers.
int64_t how_many(const CommitParams& c, int64_t entry, const Item* items, int64_t n, double* values) {
  if (c.rule == kRuleQuota) return std::min(c.quota[entry], n);
  const bool by_cost = c.rule == kRuleEntropyBound;
  for (int64_t i = 0; i < n; ++i) values[i] = by_cost ? items[i].cost : items[i].score;
  switch (c.rule) {
    case kRuleThreshold: return count_threshold(values, n, c.threshold[entry], false);
    case kRuleThresholdStrict: return count_threshold(values, n, c.threshold[entry], true);
    case kRuleFactor: return count_factor(values, n, c.param);
    case kRuleFactorAuthors: return count_factor_authors(values, n, c.param);
    case kRuleEntropyBound: return count_entropy_bound(values, n, c.param);
    default: break;
  }
  fail_must_be("commit", "rule", "0 to 5", std::to_string(c.rule));
}

// Status bits that stop an entry before anything is read through its positions.
int32_t entry_fault(const CommitParams& c, int64_t entry, int64_t begin, int64_t end, int64_t row) {
  if (!row_fits(c, row)) return kStatusBadRow;
  for (int64_t i = begin; i < end; ++i)
    if (c.pos[i] < 0 || c.pos[i] >= c.length) return kStatusBadSlot;
  return rule_fault(c, entry);
}

// One entry with valid bounds; `room` items and values. Returns status bits.
int32_t commit_entry(const CommitParams& c, int64_t entry, int64_t begin, int64_t end, Item* items, double* values) {
  const int64_t row = c.row[entry];
  if (row == -1) return kStatusOk;
  int32_t bits = entry_fault(c, entry, begin, end, row);
  if (bits != kStatusOk) return bits;

  // Live candidates grow from the front, edits from the back.
  const int64_t room = end - begin;
  int64_t live = 0, edits = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t pos = c.pos[i], token = c.token[i];
    const bool masked = c.masked_at(row, pos);
    const bool wanted = masked ? !c.eligible || c.eligible[i] : c.editable && c.editable[i];
    if (!wanted || token < 0) continue;
    const double score = c.score[i], cost = c.cost_of(i);
    if (score != score || (masked && cost != cost)) {
      bits |= kStatusNaNScore;
    } else if (masked) {
      items[live++] = {score, cost, pos, token, i};
    } else if (token != c.canvas_at(row, pos) && score > c.edit_threshold) {
      items[room - ++edits] = {score, cost, pos, token, i};
    }
  }
  Item* const edit = items + room - edits;
  std::reverse(edit, items + room);
  live = keep_best_per_position(items, live);
  edits = keep_best_per_position(edit, edits);

  std::sort(items, items + live, in_commit_order);
  const int64_t n = how_many(c, entry, items, live, values);
  for (int64_t i = 0; i < n; ++i) {
    c.canvas_at(row, items[i].pos) = items[i].token;
    c.masked_at(row, items[i].pos) = false;
    c.committed[items[i].index] = true;
  }
  for (int64_t i = 0; i < edits; ++i) {
    c.canvas_at(row, edit[i].pos) = edit[i].token;
    c.committed[edit[i].index] = true;
  }
  int64_t left = 0;
  for (int64_t i = begin; i < end; ++i) left += c.masked_at(row, c.pos[i]);
  c.count[entry] = n;
  c.left[entry] = left;
  return bits;
}

// Entries [first, last); `from[b]` is the lowest candidate that entry b may own (what earlier entries claimed ends there).
void commit_entries(const CommitParams& c, int64_t first, int64_t last, const Strided<const int64_t>& from) {
  Item inline_items[kInline];
  double inline_values[kInline];
  std::vector<Item> items;
  std::vector<double> values;
  for (int64_t b = first; b < last; ++b) {
    c.count[b] = c.left[b] = 0;
    const int64_t begin = c.cu[b], end = c.cu[b + 1];
    int32_t bits = kStatusBadSegment;
    if (begin >= from[b] && begin <= end && end <= c.candidates) {
      const int64_t room = end - begin;
      if (room > kInline && static_cast<int64_t>(items.size()) < room)
        items.resize(static_cast<size_t>(room)), values.resize(items.size());
      const bool fits = room <= kInline;
      bits = commit_entry(c, b, begin, end, fits ? inline_items : items.data(), fits ? inline_values : values.data());
    }
    if (bits != kStatusOk && c.status) c.status[b] |= bits;
  }
}

std::tuple<Tensor, Tensor, Tensor> commit(Tensor canvas, Tensor masked, const Tensor& cu, const Tensor& row,
                                          const Tensor& pos, const Tensor& token, const Tensor& score,
                                          const std::optional<Tensor>& cost, const std::optional<Tensor>& eligible,
                                          const std::optional<Tensor>& editable, int64_t rule,
                                          const std::vector<double>& params, const std::optional<Tensor>& quota,
                                          const std::optional<Tensor>& threshold, std::optional<Tensor> status) {
  check_commit(canvas, masked, cu, row, pos, token, score, cost, eligible, editable, rule, params, quota, threshold,
               status);
  const int64_t batch = row.size(0), n = pos.size(0);
  Tensor committed = empty<1>({n}, ScalarType::Bool);
  Tensor count = empty<1>({batch}, ScalarType::Long);
  Tensor left = empty<1>({batch}, ScalarType::Long);

  const CommitParams c = commit_params(canvas, masked, cu, row, pos, token, score, cost, eligible, editable, rule,
                                       params, quota, threshold, status, committed, count, left);
  std::fill_n(c.committed, n, false);

  // cu must rise: an entry may not reach back into candidates before the highest bound seen so far.
  std::vector<int64_t> highest(static_cast<size_t>(batch));
  bool own_rows = true;
  for (int64_t b = 0, top = 0; b < batch; ++b) {
    top = std::max(top, c.cu[b]);
    highest[static_cast<size_t>(b)] = top;
    own_rows = own_rows && (b == 0 || c.row[b - 1] < c.row[b]);
  }
  const Strided<const int64_t> from{highest.data(), 1};
  const int64_t grain = own_rows && n > kParallelFrom ? std::max<int64_t>(1, kParallelFrom * batch / n) : batch;
  parallel_for(batch, grain, [&](int64_t first, int64_t last) { commit_entries(c, first, last, from); });
  return {std::move(committed), std::move(count), std::move(left)};
}

}  // namespace
}  // namespace unmask::cpu

UNMASK_IMPL(CPU, commit, &unmask::cpu::commit)
