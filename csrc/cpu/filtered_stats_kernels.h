// The CPU kernel of filtered_stats.
#pragma once
#include <cstdint>

#include "common/filtered_stats.h"
#include "cpu/logit_stats_kernels.h"

namespace unmask::cpu {

constexpr int64_t kFilterPad = 64;  // elements that a vector store may write beyond the last one

// Memory of one thread, for one row at a time.
struct FilterScratch {
  float* row;  // [chunks * kStatsChunk]: chunks that had to be copied, in their places; nullptr: none can
  float* lanes;  // [chunks * 64]: lane maxima
  float* x;  // [V + kFilterPad]: logits that may be kept, by rising id
  int32_t* id;  // [V + kFilterPad]
  float* e;  // [V]: their masses
  uint32_t* key;  // [V]
  int32_t* place;  // [V]: those of them that are undecided
  unsigned char* copied;  // [chunks]: which chunks are in `row`
};

struct FilteredArgs : StatsArgs { Filters filters; };

}  // namespace unmask::cpu

// The statistics of entry `entry`, which reads row `row` of the logits.
UNMASK_DECLARE_KERNEL(unmask::EntryStats, filtered_row, const unmask::cpu::FilteredArgs& args, int64_t entry,
                      int64_t row, const unmask::cpu::FilterScratch& scratch)
