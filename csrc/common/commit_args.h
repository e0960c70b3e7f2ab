// Argument checks of commit, the same on every backend.
#pragma once
#include <cmath>
#include <vector>

#include "common/check.h"
#include "common/commit_params.h"

namespace unmask {

inline void check_commit(const Tensor& canvas, const Tensor& masked, const Tensor& cu, const Tensor& row,
                         const Tensor& pos, const Tensor& token, const Tensor& score, const std::optional<Tensor>& cost,
                         const std::optional<Tensor>& eligible, const std::optional<Tensor>& editable, int64_t rule,
                         const std::vector<double>& params, const std::optional<Tensor>& quota,
                         const std::optional<Tensor>& threshold, const std::optional<Tensor>& status) {
  const char* const op = "commit";
  const Checker check(op, canvas);
  check.dtype(canvas, "canvas", ScalarType::Long);
  check.dtype(masked, "masked", ScalarType::Bool);
  check.dtype(cu, "cu", ScalarType::Long);
  check.dtype(row, "row", ScalarType::Long);
  check.dtype(pos, "pos", ScalarType::Long);
  check.dtype(token, "token", ScalarType::Long);
  check.real(score, "score");
  if (cost) check.dtype(*cost, "cost", ScalarType::Float);
  if (eligible) check.dtype(*eligible, "eligible", ScalarType::Bool);
  if (editable) check.dtype(*editable, "editable", ScalarType::Bool);
  if (quota) check.dtype(*quota, "quota", ScalarType::Long);
  if (threshold) check.real(*threshold, "threshold");
  if (status) check.dtype(*status, "status", ScalarType::Int);

  check.shape(canvas, "canvas", "[R, L]", {-1, -1});
  check.shape(masked, "masked", "[R, L]", {canvas.size(0), canvas.size(1)});
  check.shape(row, "row", "[B]", {-1});
  const int64_t batch = row.size(0);
  check.shape(cu, "cu", "[B + 1]", {batch + 1});
  check.shape(pos, "pos", "[N]", {-1});
  const int64_t n = pos.size(0);
  check.shape(token, "token", "[N]", {n});
  check.shape(score, "score", "[N]", {n});
  if (cost) check.shape(*cost, "cost", "[N]", {n});
  if (eligible) check.shape(*eligible, "eligible", "[N]", {n});
  if (editable) check.shape(*editable, "editable", "[N]", {n});
  if (quota) check.shape(*quota, "quota", "[B]", {batch});
  if (threshold) check.shape(*threshold, "threshold", "[B]", {batch});
  if (status) check.shape(*status, "status", "[B]", {batch});

  check.require(rule >= 0 && rule < kRuleCount, "rule", "0 to 5", rule);
  const bool by_threshold = rule == kRuleThreshold || rule == kRuleThresholdStrict;
  const bool by_factor = rule == kRuleFactor || rule == kRuleFactorAuthors;
  if (rule == kRuleQuota && !quota) fail_must_be(op, "quota", "given for rule QUOTA", "None");
  if (by_threshold && !threshold) fail_must_be(op, "threshold", "given for the THRESHOLD rules", "None");
  if (rule == kRuleEntropyBound && !cost) fail_must_be(op, "cost", "given for rule ENTROPY_BOUND", "None");
  const auto count = static_cast<int64_t>(params.size());
  check.require(count <= 2, "params", "at most 2 numbers", count);
  if (by_factor || rule == kRuleEntropyBound) {
    check.require(count >= 1, "params", "at least 1 number for this rule", count);
    if (by_factor)
      check.require(std::isfinite(params[0]) && params[0] > 0.0, "params[0]", "a finite factor > 0", params[0]);
    else check.require(std::isfinite(params[0]) && params[0] >= 0.0, "params[0]", "a finite bound >= 0", params[0]);
  }
  if (editable) {
    check.require(count == 2, "params", "2 numbers when editable is given (the second is the edit threshold)", count);
    check.require(!std::isnan(params[1]), "params[1]", "an edit threshold", params[1]);
  }
  check.writable(canvas, "canvas");
  check.writable(masked, "masked");
  if (status) check.writable(*status, "status");
}

template <class T>
Strided<const T> reading(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.size(0) ? t.stride(0) : 0};
}
template <class T>
Strided<const T> reading(const std::optional<Tensor>& t) {
  return t ? reading<T>(*t) : Strided<const T>{};
}
inline Reals reading_reals(const Tensor& t) {
  return {t.const_data_ptr(), t.size(0) ? t.stride(0) : 0, shim_dtype(t) == shim_codes().float64};
}

// After check_commit.
inline CommitParams commit_params(const Tensor& canvas, const Tensor& masked, const Tensor& cu, const Tensor& row,
                                  const Tensor& pos, const Tensor& token, const Tensor& score,
                                  const std::optional<Tensor>& cost, const std::optional<Tensor>& eligible,
                                  const std::optional<Tensor>& editable, int64_t rule,
                                  const std::vector<double>& params, const std::optional<Tensor>& quota,
                                  const std::optional<Tensor>& threshold, const std::optional<Tensor>& status,
                                  const Tensor& committed, const Tensor& count, const Tensor& left) {
  CommitParams c{};
  c.canvas = static_cast<int64_t*>(canvas.mutable_data_ptr()), c.masked = static_cast<bool*>(masked.mutable_data_ptr());
  for (int i = 0; i < 2; ++i) c.canvas_stride[i] = canvas.stride(i), c.masked_stride[i] = masked.stride(i);
  c.rows = canvas.size(0), c.length = canvas.size(1), c.candidates = pos.size(0), c.entries = row.size(0);
  c.cu = reading<int64_t>(cu), c.row = reading<int64_t>(row), c.pos = reading<int64_t>(pos);
  c.token = reading<int64_t>(token), c.quota = reading<int64_t>(quota);
  c.score = reading_reals(score), c.cost = reading<float>(cost);
  if (threshold) c.threshold = reading_reals(*threshold);
  c.eligible = reading<bool>(eligible), c.editable = reading<bool>(editable);
  if (status) c.status = {static_cast<int32_t*>(status->mutable_data_ptr()), c.entries ? status->stride(0) : 0};
  c.rule = rule;
  c.param = params.empty() ? 0.0 : params[0];
  c.edit_threshold = params.size() > 1 ? params[1] : 0.0;
  c.committed = static_cast<bool*>(committed.mutable_data_ptr());
  c.count = static_cast<int64_t*>(count.mutable_data_ptr()), c.left = static_cast<int64_t*>(left.mutable_data_ptr());
  return c;
}

}  // namespace unmask
