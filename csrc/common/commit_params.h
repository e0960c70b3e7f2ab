// Arguments of commit as plain pointers and element strides, the same on every backend.
#pragma once
#include "common/commit_rules.h"
#include "common/status.h"
#include "common/strided.h"

namespace unmask {

struct CommitParams {
  int64_t* canvas;
  bool* masked;
  int64_t canvas_stride[2], masked_stride[2], rows, length, candidates, entries;
  Strided<const int64_t> cu, row, pos, token, quota;
  Strided<const float> cost;
  Reals score, threshold;
  Strided<const bool> eligible, editable;
  Strided<int32_t> status;
  int64_t rule;
  double param, edit_threshold;
  bool* committed;
  int64_t *count, *left;

  UNMASK_HD int64_t& canvas_at(int64_t r, int64_t p) const {
    return canvas[r * canvas_stride[0] + p * canvas_stride[1]];
  }
  UNMASK_HD bool& masked_at(int64_t r, int64_t p) const { return masked[r * masked_stride[0] + p * masked_stride[1]]; }
  UNMASK_HD bool by_threshold() const { return rule == kRuleThreshold || rule == kRuleThresholdStrict; }
  UNMASK_HD double cost_of(int64_t i) const { return rule == kRuleEntropyBound ? static_cast<double>(cost[i]) : 0.0; }
};

// Faults of an entry, in this order: its row, its candidates' positions (each backend's own loop), then these.
UNMASK_HD bool row_fits(const CommitParams& c, int64_t row) { return row >= 0 && row < c.rows; }
UNMASK_HD int32_t rule_fault(const CommitParams& c, int64_t entry) {
  if (c.rule == kRuleQuota && c.quota[entry] < 0) return kStatusBadSegment;
  if (c.by_threshold() && c.threshold[entry] != c.threshold[entry]) return kStatusNaNScore;
  return kStatusOk;
}

}  // namespace unmask
