// Argument checks of moe_route and moe_combine, the same on every backend.
#pragma once
#include <cmath>
#include <optional>
#include <string>

#include "common/check.h"
#include "common/moe_route.h"

namespace unmask {

// Everything but the outputs.
inline RouteParams read_route(const Checker& check, const Tensor& logits, const std::optional<Tensor>& row,
                              const std::optional<Tensor>& bias, int64_t scoring, int64_t n_groups, int64_t groups_kept,
                              int64_t top_k, bool renormalise, double scale, int64_t multiple) {
  RouteParams p{};
  check.dtype(logits, "logits", ScalarType::Float);
  if (row) check.dtype(*row, "row", ScalarType::Long);
  if (bias) check.dtype(*bias, "bias", ScalarType::Float);
  check.shape(logits, "logits", "[T, E]", {-1, -1});
  p.tokens = logits.size(0);
  p.experts = logits.size(1);
  if (row) check.shape(*row, "row", "[T]", {p.tokens});
  if (bias) check.shape(*bias, "bias", "[E]", {p.experts});
  check.require(p.experts >= 1 && p.experts <= kMaxExperts, "E of logits", "1 to 4096", p.experts);
  check.require(scoring == 0 || scoring == 1, "scoring", "0 (sigmoid) or 1 (softmax)", scoring);
  if (n_groups < 1 || p.experts % n_groups != 0)
    fail_must_be(check.op, "n_groups", "a divisor of E = " + std::to_string(p.experts), std::to_string(n_groups));
  if (groups_kept < 1 || groups_kept > n_groups)
    fail_must_be(check.op, "groups_kept", "1 to n_groups = " + std::to_string(n_groups), std::to_string(groups_kept));
  const int64_t choosable = p.experts / n_groups * groups_kept;
  if (top_k < 1 || top_k > choosable)
    fail_must_be(check.op, "top_k", "1 to the " + std::to_string(choosable) + " experts of the kept groups",
                 std::to_string(top_k));
  check.require(std::isfinite(scale), "scale", "finite", scale);
  check.require(multiple >= 1 && multiple <= 1024, "multiple", "1 to 1024", multiple);
  const int64_t pairs = p.tokens * top_k;
  p.capacity = pairs + (multiple - 1) * (pairs < p.experts ? pairs : p.experts);
  check.require(p.capacity <= INT32_MAX, "T * top_k with padding", "at most 2147483647", p.capacity);
  p.logits = static_cast<const float*>(logits.const_data_ptr());
  p.logits_stride[0] = logits.stride(0);
  p.logits_stride[1] = logits.stride(1);
  if (row) p.row = static_cast<const int64_t*>(row->const_data_ptr()), p.row_stride = row->stride(0);
  if (bias) p.bias = static_cast<const float*>(bias->const_data_ptr()), p.bias_stride = bias->stride(0);
  p.groups = n_groups;
  p.kept = groups_kept;
  p.top_k = top_k;
  p.multiple = multiple;
  p.softmax = scoring == 1;
  p.renormalise = renormalise;
  p.scale = static_cast<float>(scale);
  return p;
}

inline void check_combine(const Checker& check, const Tensor& y, const Tensor& place, const Tensor& weight) {
  check.floating(y, "y");
  check.dtype(place, "place", ScalarType::Long);
  check.dtype(weight, "weight", ScalarType::Float);
  check.shape(y, "y", "[M, D]", {-1, -1});
  check.shape(place, "place", "[T, K]", {-1, -1});
  check.shape(weight, "weight", "[T, K]", {place.size(0), place.size(1)});
}

// y has dense rows. dtype: as CombineParams counts, for kernels that ask.
inline CombineParams combine_params(const Tensor& y, const Tensor& place, const Tensor& weight, const Tensor& out,
                                    int64_t dtype) {
  return {y.const_data_ptr(),
          y.stride(0),
          y.size(0),
          y.size(1),
          dtype,
          static_cast<const int64_t*>(place.const_data_ptr()),
          {place.stride(0), place.stride(1)},
          static_cast<const float*>(weight.const_data_ptr()),
          {weight.stride(0), weight.stride(1)},
          place.size(0),
          place.size(1),
          out.mutable_data_ptr()};
}

}  // namespace unmask
