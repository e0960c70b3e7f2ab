// Argument checks of filtered_stats, the same on every backend: those of logit_stats, and the filters.
#pragma once
#include <cfloat>
#include <string>

#include "common/filtered_stats.h"
#include "common/logit_stats_args.h"

namespace unmask {

// After read_stats_inputs, which checks the temperature.
inline Filters read_filters(const Checker& check, double top_p, int64_t top_k, bool top_k_first, double temperature,
                            int64_t vocab) {
  check.require(top_p >= 0.0, "top_p", "a number of at least 0 (1 or more: off)", top_p);
  const float t = static_cast<float>(temperature) > 0.0f ? static_cast<float>(temperature) : 1.0f;
  const double scale = std::min(1.0 / static_cast<double>(t), static_cast<double>(FLT_MAX));
  return {top_p, top_k > 0 && top_k < vocab ? top_k : 0, top_k_first, t, static_cast<float>(scale), mass_bits(vocab)};
}

}  // namespace unmask
