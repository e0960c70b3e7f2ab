// The end of a tile kernel of block_attention: its splits become one. Blocks leave their rows in shared memory; those of a cluster merge
// from there, others through a workspace and tickets, in the same order with the same arithmetic: the same bits.
#pragma once
#include "cuda/block_attention_work.cuh"
#include "cuda/common/tensor_core.cuh"

namespace unmask::cuda {

// Where a block leaves its rows: kWarps states of each row (warps that took different keys), in order.
template <int kDim, int kRows, int kWarps>
struct LeftRows {
  static constexpr int kStride = kDim + 8;  // O, maximum, sum; rows g and g + 1 are 8 banks apart

  static UNMASK_DEVICE const float* at(const char* shared, int row, int warp) {
    return reinterpret_cast<const float*>(shared) + (static_cast<int64_t>(warp) * kRows + row) * kStride;
  }
  static UNMASK_DEVICE float row_max(const char* shared, int row) {
    float m = neg_inf();
    for (int w = 0; w < kWarps; ++w) m = max_drop_nan(m, at(shared, row, w)[kDim]);
    return m;
  }
  // Maximum, sum and elements [d, d + 4) of the output, not divided by the sum.
  static UNMASK_DEVICE void row_state(const char* shared, int row, int d, float* m, float* l, float (&o)[4]) {
    *m = row_max(shared, row), *l = 0.0f;
    o[0] = o[1] = o[2] = o[3] = 0.0f;
    for (int w = 0; w < kWarps; ++w) {
      const float* part = at(shared, row, w);
      const float weight = exp2_approx(part[kDim] - safe_max(*m));
      const Vec16 x = load16_mutable(part + d);
      *l = UNMASK_FMA(weight, part[kDim + 1], *l);
#pragma unroll
      for (int i = 0; i < 4; ++i) o[i] = UNMASK_FMA(weight, float_of_bits(x.w[i]), o[i]);
    }
  }
};

// The result of one split in the workspace: outputs [rows][kDim] (not divided by the sum), then maximum and sum of each row.
template <int kDim>
struct Partial {
  float* at;
  int64_t rows;
  UNMASK_DEVICE float* o(int64_t row) const { return at + row * kDim; }
  UNMASK_DEVICE float* sums(int64_t row) const { return at + rows * kDim + row * 2; }
};

// Row `row` of the tile, elements [d, d + 4): divided by the sum and written, with lse by the thread of d = 0.
template <FloatType kType>
UNMASK_DEVICE void write_row(const AttentionJob& j, const RowTile& tile, int64_t kv_head, int row, int d, float m,
                             float l, const float (&o)[4]) {
  const int64_t r = tile.row_begin + row, head = kv_head * j.group + r % j.group;
  const int64_t at = (tile.q_begin + r / j.group) * j.q_heads + head;
  const float by = 1.0f / l;
  if (d == 0) j.lse[at] = natural_lse(m, l);
  if (d >= j.dim) return;  // D is a multiple of 8
  const bool none = l == 0.0f;  // then o may be 0 x NaN
  const uint32_t low = packed_pair<kType>(o[0] * by, o[1] * by), high = packed_pair<kType>(o[2] * by, o[3] * by);
  store8(static_cast<uint16_t*>(j.out) + at * j.dim + d, none ? 0u : low, none ? 0u : high);
}

// A block's place in the launch, and its share of the keys.
struct AttentionUnit {
  int64_t split, unit, kv_head, number;  // unit: tile x kv head; number: of the row tile
  UNMASK_DEVICE explicit AttentionUnit(const AttentionJob& j)
      : split(block_index() % j.splits),
        unit(block_index() / j.splits),
        kv_head(unit % j.kv_heads),
        number(unit / j.kv_heads) {}
};
struct KeyShare {
  int64_t used, first, end;  // splits that have keys; this split's keys
  UNMASK_DEVICE KeyShare(const AttentionJob& j, const RowTile& tile, int64_t split) {
    const int64_t each = split_keys(tile.keys, j.splits, j.min_split_keys);
    used = tile.keys <= each ? 1 : (tile.keys + each - 1) / each;
    first = split * each, end = first + each < tile.keys ? first + each : tile.keys;
  }
};

// All threads of the block come here with `Left` rows in shared memory (a block of a cluster without keys has none). The first
// kAttentionWarps warps do the work.
template <FloatType kType, int kDim, class Left>
UNMASK_DEVICE void merge_splits(const AttentionJob& j, const RowTile& tile, const AttentionUnit& unit, int64_t used,
                                char* shared) {
  constexpr int kPerRow = kDim / 4, kAtOnce = kAttentionWarps * 32 / kPerRow;
  const int thread = warp_in_block() * 32 + lane_id(), d = thread % kPerRow * 4;
  const int first_row = warp_in_block() < kAttentionWarps ? thread / kPerRow : tile.rows;
  if (kHasClusters && j.cluster) {  // every block merges its share of the rows, all splits in order
    cluster_sync();
    const int stride = kAtOnce * static_cast<int>(j.splits);
    for (int row = first_row + kAtOnce * static_cast<int>(unit.split); row < tile.rows; row += stride) {
      float m = neg_inf(), l = 0.0f, o[4] = {};
      for (int s = 0; s < used; ++s) m = max_drop_nan(m, Left::row_max(cluster_shared(shared, s), row));
      for (int s = 0; s < used; ++s) {
        float part_m, part_l, part[4];
        Left::row_state(cluster_shared(shared, s), row, d, &part_m, &part_l, part);
        const float weight = exp2_approx(part_m - safe_max(m));
        l = UNMASK_FMA(weight, part_l, l);
#pragma unroll
        for (int i = 0; i < 4; ++i) o[i] = UNMASK_FMA(weight, part[i], o[i]);
      }
      write_row<kType>(j, tile, unit.kv_head, row, d, m, l, o);
    }
    cluster_sync();  // a block's shared memory lives until all have read it
    return;
  }
  const auto partial = [&](int64_t s) {
    return Partial<kDim>{j.partial + (unit.unit * j.splits + s) * j.row_tile * partial_row_floats(kDim), j.row_tile};
  };
  for (int row = first_row; row < tile.rows; row += kAtOnce) {
    float m, l, o[4];
    Left::row_state(shared, row, d, &m, &l, o);
    if (used == 1) {
      write_row<kType>(j, tile, unit.kv_head, row, d, m, l, o);
      continue;
    }
    const Partial<kDim> mine = partial(unit.split);
    store16(mine.o(row) + d, {bits_of_float(o[0]), bits_of_float(o[1]), bits_of_float(o[2]), bits_of_float(o[3])});
    if (d == 0) mine.sums(row)[0] = m, mine.sums(row)[1] = l;
  }
  if (used == 1) return;

  // The block that finishes last merges all splits.
  block_sync();
  auto* ticket = reinterpret_cast<uint32_t*>(shared);
  if (thread == 0) {
    device_fence();  // releases what the barrier has gathered from the block, and acquires for it what others released
    *ticket = device_count_up(j.tickets + unit.unit);
    device_fence();
  }
  block_sync();
  if (*ticket != static_cast<uint32_t>(used - 1)) return;
  for (int row = first_row; row < tile.rows; row += kAtOnce) {
    float m = neg_inf(), l = 0.0f, o[4] = {};
    for (int64_t s = 0; s < used; ++s) m = max_drop_nan(m, partial(s).sums(row)[0]);
    for (int64_t s = 0; s < used; ++s) {
      const Partial<kDim> part = partial(s);
      const float weight = exp2_approx(part.sums(row)[0] - safe_max(m));
      const Vec16 x = load16_mutable(part.o(row) + d);
      l = UNMASK_FMA(weight, part.sums(row)[1], l);
#pragma unroll
      for (int i = 0; i < 4; ++i) o[i] = UNMASK_FMA(weight, float_of_bits(x.w[i]), o[i]);
    }
    write_row<kType>(j, tile, unit.kv_head, row, d, m, l, o);
  }
}

}  // namespace unmask::cuda
