// How a call of the logit statistics is cut into warps and launches: pure functions of sizes and strides (tests call
// them on the host). Nothing here changes a bit of the result.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cuda/logit_stats.cuh"

namespace unmask::cuda {

constexpr int64_t kSumWords = sizeof(SumExp) / 4;
constexpr int64_t kGroupWords = sizeof(GroupBest) / 4;
constexpr int64_t kWorkspaceWords = int64_t{1}
                                    << 24;  // 64 MiB of partial results at most, unless one entry alone needs more
constexpr int64_t kBusyWarps = 16384;                  // about what 132 SMs hold four times over
constexpr int64_t kMaxGroupChunks = 8;

struct StatsPlan { int64_t chunks, group_chunks, groups, entries_per_launch; };

// A longer group searches fewer slices and writes fewer partials; a shorter one spreads few rows over the machine.
inline StatsPlan plan_stats(int64_t entries, int64_t count) {
  StatsPlan p;
  p.chunks = (count + kStatsChunk - 1) / kStatsChunk;
  p.group_chunks = std::clamp<int64_t>(entries * p.chunks / kBusyWarps, 1, std::min(kMaxGroupChunks, p.chunks));
  p.groups = (p.chunks + p.group_chunks - 1) / p.group_chunks;
  p.entries_per_launch = std::clamp<int64_t>(kWorkspaceWords / (p.chunks * kSumWords + p.groups * kGroupWords), 1,
                                             std::max<int64_t>(entries, 1));
  return p;
}

constexpr int64_t kClusterEntries = 128;  // more rows keep the machine busy without clusters
constexpr int64_t kStatsClusterBlocks = 8;

// One launch with a cluster per entry: how many blocks it has, and warps each, one chunk a warp. blocks 0: not taken.
struct StatsClusterPlan {
  int blocks, warps;
  int64_t shared_bytes() const { return int64_t{warps} * 2 * kMarkWords * 4; }
};

inline StatsClusterPlan plan_stats_cluster(int64_t entries, int64_t count, bool has_clusters) {
  const int64_t chunks = (count + kStatsChunk - 1) / kStatsChunk;
  if (!has_clusters || entries > kClusterEntries || chunks < 2 || chunks > kStatsClusterBlocks * kMostClusterWarps)
    return {0, 0};
  const int64_t warps = (chunks + kStatsClusterBlocks - 1) / kStatsClusterBlocks;
  return {static_cast<int>((chunks + warps - 1) / warps), static_cast<int>(warps)};
}

// Rows start at multiples of 16 bytes and hold neighbouring ids.
inline bool can_load_dense(const StatsInputs& in) {
  const int64_t size = in.type == FloatType::f32 ? 4 : 2;
  const auto dense = [&](const void* at, int64_t row, int64_t column) {
    return column == 1 && reinterpret_cast<uintptr_t>(at) % 16 == 0 && row * size % 16 == 0;
  };
  return dense(in.logits, in.row_stride, in.col_stride) &&
         (in.null_logits == nullptr || dense(in.null_logits, in.null_row_stride, in.null_col_stride));
}

}  // namespace unmask::cuda
