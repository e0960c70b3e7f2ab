// Which rows and keys a block of block_attention works on, found on the device: offsets, cache rows and segments are never read by the
// host. Every warp finds the same answer on its own, so no barrier is needed; one scan step covers 32 entries.
#pragma once
#include "common/status.h"
#include "common/strided.h"
#include "cuda/block_attention_plan.h"
#include "cuda/common/elements.cuh"

namespace unmask::cuda {

struct AttentionJob {
  const void *q, *k, *v;  // [T, Hq, D], [R, Hkv, S, D]
  void* out;  // [T, Hq, D] dense
  float* lse;  // [T, Hq] dense
  int64_t q_stride[3], k_stride[4], v_stride[4];  // elements
  int64_t tokens, q_heads, kv_heads, group, dim, rows, slots, batch, segments;
  Strided<const int64_t> cu_q, kv_row, q_end;  // q_end: may be null
  const int64_t* seg;  // [B, G, 2]
  int64_t seg_stride[3];
  const uint8_t* mask;  // [B or 1, Qmax, W] or null
  int64_t mask_stride[3], q_max, mask_width;
  Strided<int32_t> status;  // may be null
  float scale;  // of the scores, times log2(e): the softmax works in powers of two
  int64_t row_tile, splits, min_split_keys, stages;
  bool cluster;  // the blocks of a tile's splits are one cluster
  float* partial;  // [tile][kv head][split][row tile][D' + 2], null where a cluster merges or nothing is split
  uint32_t* tickets;  // [tile][kv head], zero before the launch
};

// What one entry says, checked on its own; the order of the offsets is checked in the scan.
struct EntryInfo {
  int64_t begin = 0, end = 0, row = -1, keys = 0;
  int32_t fault = kStatusOk;
};

UNMASK_DEVICE EntryInfo read_entry(const AttentionJob& j, int64_t b) {
  EntryInfo e;
  e.begin = j.cu_q[b], e.end = j.cu_q[b + 1], e.row = j.kv_row[b];
  const int64_t* s = j.seg + b * j.seg_stride[0];
  for (int64_t g = 0; g < j.segments; ++g) {
    const int64_t start = s[g * j.seg_stride[1]], length = s[g * j.seg_stride[1] + j.seg_stride[2]];
    if (start < 0 || length < 0 || start > j.slots || length > j.slots - start) {
      e.fault |= kStatusBadSegment;
      break;
    }
    e.keys += length;
  }
  if (e.row < -1 || e.row >= j.rows) e.fault |= kStatusBadRow;
  if (e.begin < 0 || e.end < e.begin || e.end > j.tokens || (j.mask != nullptr && e.end - e.begin > j.q_max))
    e.fault |= kStatusBadSegment;
  return e;
}

UNMASK_DEVICE int64_t prefix_sum(int64_t v) {
  for (int by = 1; by < 32; by <<= 1) {
    const int64_t other = warp_get_up(v, by);
    if (lane_id() >= by) v += other;
  }
  return v;
}

// One tile of packed rows of one entry. Packed row r is token q_begin + r / group and head r % group of the kv head's group.
// A tile that opens its entry also zeroes the uncovered tokens before it, and the last entry's last tile those behind.
struct RowTile {
  bool found = false;
  int64_t entry = 0, q_begin = 0, row_begin = 0, cache_row = 0, keys = 0;
  int rows = 0;  // 1 .. row_tile
  int64_t gap_begin = 0, gap_end = 0, tail_begin = 0;  // tokens to zero: [gap_begin, gap_end) and [tail_begin, T)
};

// Tile number `tile` of the call. Every lane returns the same. `report`: also set the status bits of bad entries.
UNMASK_DEVICE RowTile find_row_tile(const AttentionJob& j, int64_t tile, bool report) {
  RowTile out;
  out.tail_begin = j.tokens;
  int64_t reached = 0, covered = 0, tiles = 0;  // over the entries before this step
  for (int64_t first = 0; first < j.batch; first += 32) {
    const int64_t b = first + lane_id();
    EntryInfo e;
    if (b < j.batch) e = read_entry(j, b);
    const int64_t top = e.begin > e.end ? e.begin : e.end;
    const int64_t top_here = prefix_max(top > reached ? top : reached);
    const int64_t before = warp_get_up(top_here, 1);
    if (b < j.batch && e.begin < (lane_id() == 0 ? reached : before)) e.fault |= kStatusBadSegment;
    const bool live = b < j.batch && e.fault == 0 && e.row >= 0 && e.end > e.begin;
    if (report && b < j.batch && e.fault != 0) j.status[b] |= e.fault;

    const int64_t end_here = prefix_max(live && e.end > covered ? e.end : covered);
    const int64_t covered_before = warp_get_up(end_here, 1);
    const int64_t gap_begin = lane_id() == 0 ? covered : covered_before;
    const int64_t rows = live ? (e.end - e.begin) * j.group : 0;
    const int64_t own = (rows + j.row_tile - 1) / j.row_tile, sum = tiles + prefix_sum(own);
    const uint32_t owner = warp_ballot(tile >= sum - own && tile < sum);
    if (owner != 0) {
      const int from = lowest_bit(owner);
      const int64_t index = tile - (sum - own), row_begin = index * j.row_tile, left = rows - row_begin;
      out.found = true;
      out.entry = first + from;
      out.q_begin = warp_get(e.begin, from);
      out.row_begin = warp_get(row_begin, from);
      out.cache_row = warp_get(e.row, from);
      out.keys = warp_get(e.keys, from);
      out.rows = static_cast<int>(warp_get(left < j.row_tile ? left : j.row_tile, from));
      out.gap_begin = warp_get(index == 0 ? gap_begin : e.begin, from);
      out.gap_end = out.q_begin;
    }
    reached = warp_get(top_here, 31), covered = warp_get(end_here, 31), tiles = warp_get(sum, 31);
    if (out.found && !report && tile < tiles - 1) return out;
  }
  if (out.found && tile == tiles - 1) out.tail_begin = covered;
  if (!out.found && tiles == 0 && tile == 0) out.tail_begin = 0;  // no entry at all: the first block zeroes everything
  return out;
}

// Out 0 and lse -inf for all q heads of one kv head of tokens [begin, end); every thread of the block takes a part.
template <FloatType kType>
UNMASK_DEVICE void zero_tokens(const AttentionJob& j, int64_t kv_head, int64_t begin, int64_t end) {
  using Bits = typename Element<kType>::Bits;
  const int64_t width = j.group * j.dim;
  const int thread = warp_in_block() * 32 + lane_id();
  for (int64_t t = begin; t < end; ++t) {
    Bits* out = static_cast<Bits*>(j.out) + (t * j.q_heads + kv_head * j.group) * j.dim;
    for (int64_t i = thread; i < width; i += kAttentionWarps * 32) out[i] = 0;
    for (int64_t i = thread; i < j.group; i += kAttentionWarps * 32)
      j.lse[t * j.q_heads + kv_head * j.group + i] = neg_inf();
  }
}

// The tokens that no entry covers, next to this tile: one block of each kv head.
template <FloatType kType>
UNMASK_DEVICE void zero_uncovered(const AttentionJob& j, const RowTile& tile, int64_t kv_head) {
  zero_tokens<kType>(j, kv_head, tile.gap_begin, tile.gap_end);
  zero_tokens<kType>(j, kv_head, tile.tail_begin, j.tokens);
}
// One warp of the launch sets the status bits of bad entries.
UNMASK_DEVICE bool reports_faults(const AttentionJob& j) {
  return block_index() == 0 && warp_in_block() == 0 && j.status;
}

// The cache slot of each key of an entry's joined segments, for keys asked for in rising order, below the entry's count.
class SlotCursor {
 public:
  UNMASK_DEVICE SlotCursor(const AttentionJob& j, int64_t entry)
      : seg_(j.seg + entry * j.seg_stride[0]), step_(j.seg_stride[1]), field_(j.seg_stride[2]) {}

  UNMASK_DEVICE int64_t slot(int64_t key) {
    while (key >= end_) {
      first_ = end_;
      start_ = seg_[0];
      end_ += seg_[field_];
      seg_ += step_;
    }
    return start_ + (key - first_);
  }

 private:
  const int64_t* seg_;
  int64_t step_, field_, first_ = 0, end_ = 0, start_ = 0;
};

// What of its entry's keys one packed row sees.
struct RowView {
  int64_t end = 0;  // the first `end` keys; 0 for a row that does not exist
  const uint8_t* mask = nullptr;  // of its columns
};

UNMASK_DEVICE RowView row_view(const AttentionJob& j, const RowTile& tile, int row) {
  RowView view;
  if (row >= tile.rows) return view;
  const int64_t token = (tile.row_begin + row) / j.group;
  view.end = tile.keys;
  if (j.q_end) {
    const int64_t end = j.q_end[tile.q_begin + token];
    view.end = end < 0 ? 0 : end < tile.keys ? end : tile.keys;
  }
  if (j.mask != nullptr) view.mask = j.mask + tile.entry * j.mask_stride[0] + token * j.mask_stride[1];
  return view;
}

UNMASK_DEVICE bool sees(const AttentionJob& j, const RowTile& tile, const RowView& view, int64_t key) {
  if (key >= view.end) return false;
  const int64_t column = key - (tile.keys - j.mask_width);
  return view.mask == nullptr || column < 0 || view.mask[column * j.mask_stride[2]] != 0;
}

// 0 where the maximum is -inf: then every weight is 2^(-inf - 0) = 0 and nothing becomes NaN.
UNMASK_DEVICE float safe_max(float m) { return m == neg_inf() ? 0.0f : m; }

// The natural logsumexp of a row with maximum m (in powers of two) and sum l; -inf where it saw nothing.
UNMASK_DEVICE float natural_lse(float m, float l) {
  return l == 0.0f ? neg_inf() : (m + log2f(l)) * 0.693147180559945309f;
}

}  // namespace unmask::cuda
