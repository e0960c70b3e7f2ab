// Argument checks of `uniform`, the same on every backend. Returns N.
#pragma once

#include "common/check.h"

namespace unmask {

inline int64_t check_uniform(const Tensor& seed, const Tensor& step, const Tensor& pos) {
  const Checker check("uniform", seed);
  check.dtype(seed, "seed", ScalarType::Long);
  check.dtype(step, "step", ScalarType::Long);
  check.dtype(pos, "pos", ScalarType::Long);
  check.shape(seed, "seed", "[N]", {-1});
  const int64_t n = seed.size(0);
  check.shape(step, "step", "[N]", {n});
  check.shape(pos, "pos", "[N]", {n});
  return n;
}

}  // namespace unmask
