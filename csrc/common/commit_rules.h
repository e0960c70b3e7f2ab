// How many candidates a rule commits. Pure functions on arrays that are already in commit order (score descending, position ascending),
// usable on every backend. All arithmetic is double, which holds fp32 scores and costs exactly. Each returns 0 only for n == 0 or (quota) on request.
#pragma once
#include <cstdint>

#include "common/philox.h"  // UNMASK_HD

namespace unmask {

// python/unmask/ops/commit.py repeats these values (tests compare them through the op's behaviour).
enum CommitRule : int64_t {
  kRuleQuota = 0,  // min(quota, n)
  kRuleThreshold = 1,  // score >= threshold, at least 1 (Fast-dLLM v1, Alg. 1; FreeDave)
  kRuleThresholdStrict = 2,  // score > threshold, at least 1 (Fast-dLLM v2, SDAR, LLaDA2)
  kRuleFactor = 3,  // largest k with (k + 1)(1 - score_(k)) < f, at least 1 (Fast-dLLM, theorem 1)
  kRuleFactorAuthors = 4,  // the same as Fast-dLLM's code has it, off by one at the last rank
  kRuleEntropyBound = 5,  // largest k with sum cost - max cost <= gamma over the first k, at least 1 (EB-Sampler)
  kRuleCount = 6,
};

UNMASK_HD int64_t count_threshold(const double* score, int64_t n, double threshold, bool strict) {
  int64_t k = 0;
  while (k < n && (strict ? score[k] > threshold : score[k] >= threshold)) ++k;
  return k > 0 || n == 0 ? k : 1;
}

// (k + 1)(1 - score_(k)) never falls along the order while it is positive, so the prefix up to the first failure is the largest k.
UNMASK_HD int64_t count_factor(const double* score, int64_t n, double factor) {
  int64_t k = 0;
  while (k < n && static_cast<double>(k + 2) * (1.0 - score[k]) < factor) ++k;
  return k > 0 || n == 0 ? k : 1;
}

// Rank r (from 1) fails below the bar 1 - f / (r + 1), rank 1 never; the scan stops at the first failure and commits the ranks before
// it, but a first failure at the last rank commits that rank too.
UNMASK_HD int64_t count_factor_authors(const double* score, int64_t n, double factor) {
  int64_t k = n > 0 ? 1 : 0;
  while (k < n && !(score[k] < 1.0 - factor / static_cast<double>(k + 2))) ++k;
  return k == n - 1 ? n : k;
}

// The largest k, not the first failure: a slightly negative cost (a rounded KL) may lower the sum again.
UNMASK_HD int64_t count_entropy_bound(const double* cost, int64_t n, double gamma) {
  int64_t best = n > 0 ? 1 : 0;
  double sum = 0.0, largest = 0.0;
  for (int64_t k = 0; k < n; ++k) {
    const double c = cost[k];
    sum += c;
    largest = k == 0 || c > largest ? c : largest;
    if (sum - largest <= gamma) best = k + 1;
  }
  return best;
}

}  // namespace unmask
