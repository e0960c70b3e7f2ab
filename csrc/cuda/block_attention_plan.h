// How a call of block_attention is cut: pure functions of sizes and of the device (tests/test_cuda_plan.py calls them on the host).
// Lengths lie on the device, so the grid is an upper bound; a block without work leaves.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/philox.h"  // UNMASK_HD

namespace unmask::cuda {

constexpr int kTileKeys = 64;  // keys per pipeline stage
constexpr int kAttentionWarps = 4;  // per block
constexpr int64_t kWgmmaRows = 64;  // packed rows of an entry up to which the Hopper kernel is taken
constexpr int64_t kLeastSlots = 4,
                  kMostSlots = 12;  // of its ring; a step holds V and the next K, and waits for two more
constexpr int kPlainTile = 4;  // packed rows per block of the plain kernel, one a warp
constexpr int64_t kMinSplitKeys = 256;  // a shorter split costs more in merging than it saves in reading
constexpr int64_t kInvariantSplitKeys = 2048;
constexpr int64_t kMaxSplits = 32;
constexpr int64_t kInvariantSplits = 8;
constexpr int64_t kClusterBlocks = 8;  // the portable cluster size

struct AttentionShape {
  int64_t tokens, batch, q_heads, kv_heads, dim, slots, segments;
  bool half;  // bf16 or fp16
  bool aligned;  // K and V rows dense and 16-byte aligned, Q pairs dense and 4-byte aligned
  bool mappable;  // a tensor map can describe K and V (can_map)
  bool batch_invariant;
};

struct AttentionDevice {
  int64_t multiprocessors, shared_per_block, shared_per_multiprocessor;  // bytes; per block: the most one may ask for
  bool clusters;  // sm_90 and later
  bool wgmma;  // sm_90 itself, and the library was compiled for sm_90a
};

// A slice of a device with few multiprocessors may not hold a whole cluster.
inline bool has_clusters(const AttentionDevice& device) {
  return device.clusters && device.multiprocessors >= 2 * kClusterBlocks;
}

struct AttentionPlan {
  bool tensor_cores;  // else the plain kernel
  bool wgmma;  // the Hopper kernel
  int dim;  // padded: 64 or 128 (plain: the dim itself)
  int row_warps;  // 1, 2 or 4 of the block's 4 warps own 16 rows each; the others of a row share its keys (wgmma: 4)
  int64_t row_tile;  // packed rows per block
  int64_t stages;  // of K and V together; wgmma: slots of its ring, K and V by turns
  int64_t shared_bytes;
  int64_t blocks_each;  // blocks that live on a multiprocessor at once
  int64_t splits;  // most splits of an entry's keys
  int64_t min_split_keys;
  int64_t tiles;  // most row tiles that the entries can have together
  int64_t blocks;  // tiles x kv heads x splits
  bool cluster;  // the splits of a tile are one cluster and merge through its shared memory; else through the workspace
  int64_t partial_floats;  // workspace of split results; 0 without splits and in a cluster
};

// Floats that one row leaves in the workspace: its output, maximum and sum.
UNMASK_HD int64_t partial_row_floats(int64_t dim) { return dim + 2; }

// Epilogue: every warp leaves 16 rows in shared memory, 8 floats longer than dim (two of them its maximum and sum), so that the 8-byte
// stores of a half warp meet no bank twice.
constexpr int64_t merge_bytes(int64_t dim) { return kAttentionWarps * 16 * (dim + 8) * 4; }
constexpr int64_t stage_bytes(int64_t dim) { return 2 * kTileKeys * dim * 2; }  // K and V, 16-bit

constexpr int64_t kBarrierBytes = 256;  // two barriers a slot, behind the ring

// A tensor map takes sizes below 2^32 and strides (in elements, all but the last dimension) that move on, below 2^40 bytes.
inline bool can_map(const int64_t* size, const int64_t* stride) {
  for (int d = 0; d < 4; ++d)
    if (size[d] < 1 || size[d] >= (int64_t{1} << 31)) return false;
  for (int d = 0; d < 3; ++d)
    if (size[d] > 1 && (stride[d] <= 0 || stride[d] * 2 >= (int64_t{1} << 40))) return false;
  return true;
}

// Tiles of `tile` packed rows that `batch` entries with `rows` packed rows in all can have at most.
constexpr int64_t most_tiles(int64_t rows, int64_t batch, int64_t tile) { return (rows + batch * (tile - 1)) / tile; }

inline AttentionPlan plan_attention(const AttentionShape& s, const AttentionDevice& device) {
  AttentionPlan p{};
  const int64_t group = s.kv_heads > 0 ? s.q_heads / s.kv_heads : 0, rows = s.tokens * group;
  // the slots of a row are joined, perhaps repeatedly; key counts are 32-bit in the tile kernel
  p.tensor_cores =
      s.half && s.aligned && s.dim <= 128 && s.slots * std::max<int64_t>(s.segments, 1) < (int64_t{1} << 30);
  p.splits = 1;
  if (!p.tensor_cores) {
    p.dim = static_cast<int>(s.dim), p.row_warps = kAttentionWarps, p.row_tile = kPlainTile;
    p.shared_bytes = kAttentionWarps * 2 * s.dim * 4;
  } else {
    p.dim = s.dim <= 64 ? 64 : 128;
    const int64_t each = s.batch_invariant ? 32 : s.batch > 0 ? (s.tokens + s.batch - 1) / s.batch * group : 0;
    p.wgmma = device.wgmma && s.mappable && each <= kWgmmaRows;
    p.row_warps = p.wgmma ? 4 : each <= 16 ? 1 : each <= 32 ? 2 : 4;
    p.row_tile = 16 * p.row_warps;
  }
  if (p.wgmma) {
    const int64_t tile = stage_bytes(p.dim) / 2, half = device.shared_per_multiprocessor / 2 - 1024;
    p.blocks_each = 2;
    p.stages = std::clamp<int64_t>((half - kBarrierBytes) / tile, kLeastSlots, kMostSlots);
    p.shared_bytes = p.stages * tile + kBarrierBytes;
  } else if (p.tensor_cores) {
    // two blocks per multiprocessor hide each other's barriers, and more stages more of the DRAM latency; where two do not fit, one
    const int64_t half = std::min(device.shared_per_block, device.shared_per_multiprocessor / 2 - 1024);
    p.blocks_each = half / stage_bytes(p.dim) >= 2 ? 2 : 1;
    p.stages = std::clamp<int64_t>((p.blocks_each == 2 ? half : device.shared_per_block) / stage_bytes(p.dim), 2, 4);
    p.shared_bytes = std::max(p.stages * stage_bytes(p.dim), merge_bytes(p.dim));
  }
  if (s.tokens > 0 ||
      s.batch > 0)  // the first block zeroes uncovered tokens and reports faults, so there is always one
    p.tiles = std::max<int64_t>(1, most_tiles(rows, s.batch, p.row_tile));
  if (p.tensor_cores && p.tiles > 0) {
    const int64_t keys = s.slots * s.segments;
    if (s.batch_invariant) {  // a row's splits depend on its own keys only
      p.min_split_keys = kInvariantSplitKeys;
      // rounded up: with fewer than the most splits each is kInvariantSplitKeys long, whatever the capacity of the cache
      p.splits = std::clamp<int64_t>((keys + kInvariantSplitKeys - 1) / kInvariantSplitKeys, 1, kInvariantSplits);
    } else {
      p.min_split_keys = kMinSplitKeys;
      const int64_t likely = std::max<int64_t>({1, s.batch, (rows + p.row_tile - 1) / p.row_tile}) * s.kv_heads;
      // merging through the workspace costs more than idle multiprocessors, unless very few blocks would run
      const bool few = likely * kClusterBlocks < device.multiprocessors / 2;
      const int64_t most = has_clusters(device) && !few ? kClusterBlocks : kMaxSplits;
      const int64_t want = std::min({p.blocks_each * device.multiprocessors / likely, keys / kMinSplitKeys, most});
      while (p.splits * 2 <= want) p.splits *= 2;
    }
  }
  p.blocks = p.tiles * s.kv_heads * p.splits;
  p.cluster = has_clusters(device) && p.splits > 1 && p.splits <= kClusterBlocks;
  if (p.splits > 1 && !p.cluster) p.partial_floats = p.blocks * p.row_tile * partial_row_floats(p.dim);
  return p;
}

// Keys of one split of an entry with `keys` keys: the same on the host and on the device.
UNMASK_HD int64_t split_keys(int64_t keys, int64_t splits, int64_t min_keys) {
  const int64_t even = (keys + splits - 1) / splits, least = even < min_keys ? min_keys : even;
  return (least + kTileKeys - 1) / kTileKeys * kTileKeys;
}

}  // namespace unmask::cuda
