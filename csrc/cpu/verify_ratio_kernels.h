// The CPU kernels of verify_ratio.
#pragma once
#include <cstdint>

#include "common/verify_ratio.h"
#include "cpu/isa.h"

namespace unmask::cpu {

struct RatioArgs : RatioInputs {
  const int32_t* forbid;  // sorted, inside [0, vocab)
  int64_t n_forbid;
};

}  // namespace unmask::cpu

// The sum over chunk `chunk` of the row of position `n` on side `side` (0: p, 1: q).
UNMASK_DECLARE_KERNEL(unmask::SumExp, ratio_sum, const unmask::cpu::RatioArgs& args, int side, int64_t n, int64_t chunk)
// The drafted token's logit on a side, -inf if it is forbidden.
UNMASK_DECLARE_KERNEL(float, ratio_logit, const unmask::cpu::RatioArgs& args, int side, int64_t n)
// The draw from chunk `chunk` at position `n`; sums: those of its two rows.
UNMASK_DECLARE_KERNEL(unmask::ResidualDraw, ratio_draw, const unmask::cpu::RatioArgs& args, int64_t n, int64_t chunk,
                      const unmask::SumExp* sums)
