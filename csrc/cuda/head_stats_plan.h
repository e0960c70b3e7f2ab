// How fused_head_stats is cut: pure functions (tests call them on the host).
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/philox.h"  // UNMASK_HD

namespace unmask::cuda {

constexpr int kHeadUnit = 64;  // ids of one product of a warpgroup
constexpr int kHeadUnits = 3;  // units of a tile, one per warpgroup
constexpr int kHeadIds = kHeadUnit * kHeadUnits;
constexpr int kHeadStep = 64;  // elements of a row of weights per stage
constexpr int kHeadWarps = 4 * kHeadUnits;  // that multiply; one more asks for tiles
constexpr int64_t kHeadRows = 64;  // most entries
constexpr int kHeadLogitStride = kHeadIds + 8;  // elements of a token's logits in shared memory
constexpr int kHeadMarkWords = 8;
constexpr int64_t kHeadMostStages = 8;

struct HeadPlan {
  int tokens;  // columns of a product: 32 or 64
  int64_t units, blocks;  // units of the vocabulary; blocks take neighbouring units, evenly
  int64_t stages, stage_bytes, shared_bytes;
};

// Behind the stages: barriers, logits of a tile (16-bit), marks of forbidden and suppressed ids of each warp.
constexpr int64_t head_tail_bytes(int tokens) {
  return kHeadMostStages * 16 + int64_t{tokens} * kHeadLogitStride * 2 + kHeadWarps * 2 * kHeadMarkWords * 4;
}

// entries: 1 to kHeadRows.
inline HeadPlan plan_head(int64_t entries, int64_t vocab, int64_t multiprocessors, int64_t shared_per_block) {
  HeadPlan p{};
  p.tokens = entries <= 32 ? 32 : 64;
  p.units = (vocab + kHeadUnit - 1) / kHeadUnit;
  p.blocks = std::min(p.units, multiprocessors);
  p.stage_bytes = kHeadIds * 128 + p.tokens * 128;
  p.stages = std::clamp<int64_t>((shared_per_block - head_tail_bytes(p.tokens)) / p.stage_bytes, 2, kHeadMostStages);
  p.shared_bytes = p.stages * p.stage_bytes + head_tail_bytes(p.tokens);
  return p;
}

// Units [first, end) of a block. They do not depend on the rows, so neither do the bits of a row.
struct UnitRange { int64_t first, end; };
UNMASK_HD UnitRange head_units(int64_t block, int64_t blocks, int64_t units) {
  return {block * units / blocks, (block + 1) * units / blocks};
}

}  // namespace unmask::cuda
