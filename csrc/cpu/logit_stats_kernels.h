// The CPU kernels of logit_stats, stats_tile and stats_finish.
#pragma once
#include <cstdint>

#include "common/logit_stats_params.h"
#include "common/online.h"
#include "cpu/isa.h"

namespace unmask::cpu {

struct StatsArgs : StatsInputs {
  const int32_t *forbid, *suppress;  // sorted, inside [0, vocab)
  int64_t n_forbid, n_suppress;
  int32_t list_status;  // kStatusBadId if forbid or suppress held an id >= vocab
};

}  // namespace unmask::cpu

// Folds chunks [chunk_begin, chunk_end) of the given ids, read from row `row` for entry `entry`, into *state.
UNMASK_DECLARE_KERNEL(void, stats_fold, const unmask::cpu::StatsArgs& args, int64_t entry, int64_t row,
                      int64_t chunk_begin, int64_t chunk_end, unmask::StatsState* state)
// *into = *into followed by *right (the ids right of it).
UNMASK_DECLARE_KERNEL(void, stats_merge, unmask::StatsState* into, const unmask::StatsState* right)
// Logits at the entry's ids that lie in the given range -> out[i * stride]; ids elsewhere are left alone. Returns
// status bits.
UNMASK_DECLARE_KERNEL(int32_t, stats_at_ids, const unmask::cpu::StatsArgs& args, int64_t entry, int64_t row, float* out,
                      int64_t stride)
// All outputs of one entry from its state.
UNMASK_DECLARE_KERNEL(void, stats_outputs, const unmask::StatsOutputs& args, int64_t entry,
                      const unmask::StatsState* state)
