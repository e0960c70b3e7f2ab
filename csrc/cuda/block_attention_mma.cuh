// block_attention on tensor cores, sm_80 and later (variant P): bf16 and fp16, D up to 128. tests run this code on emulated warps.
//
// Formula: out = softmax(scale Q K^T) V over the keys that a token sees, online: per tile of keys m' = max(m, s), l = 2^(m - m') l + sum p,
// O = 2^(m - m') O + P V with p = 2^(s - m'), s = scale log2(e) q.k.
// Bytes: K and V of an entry once per row tile, 4 n D; Q and out once. FLOPs: 4 rows n D, so FLOP/B = rows: memory-bound up to ~128 rows.
// Work split: block = row tile (16 row_warps packed rows: tokens x heads of one kv head, so that K and V are read once per group) x kv
// head x split of the keys. Of its 4 warps row_warps own 16 rows each; warps of the same rows take different keys of every tile, and their
// states are merged once at the end, in order. Nothing depends on the batch but the split, which a fixed rule can make independent too.
// Layout: tiles of 64 keys x D' (D padded with zeros to 64 or 128) for K and V, 2 to 4 stages filled by cp.async. A row of D' is cut into
// 16-byte chunks, chunk c of key n lies at place c ^ (n % 8): the 8 rows that one ldmatrix reads meet 8 different groups of banks.
// Registers at D' = 128: O 64, Q 32, S 8 to 32.
#pragma once
#include "cuda/block_attention_rows.cuh"

namespace unmask::cuda {

template <FloatType kType, int kDim, int kRowWarps>
class AttentionWarp {
 public:
  static constexpr int kKeyWarps = kAttentionWarps / kRowWarps;
  static constexpr int kWarpKeys = kTileKeys / kKeyWarps;  // of each tile
  static constexpr int kRows = 16 * kRowWarps;  // of the block
  static constexpr int kRowBytes = kDim * 2, kTileBytes = kTileKeys * kRowBytes, kStageBytes = 2 * kTileBytes;
  using Left = LeftRows<kDim, kRows, kKeyWarps>;

  UNMASK_DEVICE AttentionWarp(const AttentionJob& j, const RowTile& tile, int64_t kv_head, char* shared)
      : j_(j),
        shared_(shared),
        cursor_(j, tile.entry),
        kv_head_(kv_head),
        thread_(warp_in_block() * 32 + lane_id()),
        key_warp_(warp_in_block() % kKeyWarps),
        limits_(key_limits(j, tile)),
        rows_(j, tile, warp_in_block() / kKeyWarps * 16) {
    const int64_t at[2] = {tile.cache_row * j.k_stride[0] + kv_head * j.k_stride[1],
                           tile.cache_row * j.v_stride[0] + kv_head * j.v_stride[1]};
    k_ = static_cast<const uint16_t*>(j.k) + at[0], v_ = static_cast<const uint16_t*>(j.v) + at[1];
  }

  // Keys [first_key, last_key) of the entry; the block's rows then lie in shared memory.
  UNMASK_DEVICE void run(int64_t first_key, int64_t last_key) {
    const int64_t end = last_key < limits_.most ? last_key : limits_.most;
    const int64_t tiles = end > first_key ? (end - first_key + kTileKeys - 1) / kTileKeys : 0;
    const int stages = static_cast<int>(j_.stages);
    for (int s = 0; s < stages - 1; ++s) {
      if (s < tiles) copy_tile(s, first_key + s * kTileKeys, end);
      copy_async_commit();
    }
    rows_.load_queries(kv_head_, q_);
    int stage = 0, fill = stages - 1;
    for (int64_t i = 0; i < tiles; ++i) {
      wait_for_oldest(stages);
      block_sync();  // this tile has arrived for every thread, and every warp is done with the one before
      if (i + stages - 1 < tiles) copy_tile(fill, first_key + (i + stages - 1) * kTileKeys, end);
      copy_async_commit();
      attend(shared_ + stage * kStageBytes, first_key + i * kTileKeys + key_warp_ * kWarpKeys, end);
      if (++stage == stages) stage = 0;
      if (++fill == stages) fill = 0;
    }
    copy_async_wait<0>();
    block_sync();  // the stages become the place where warps leave their rows
    rows_.leave([&](int row) { return const_cast<float*>(Left::at(shared_, row, key_warp_)); });
    block_sync();
  }

 private:
  using Rows = AttentionRows<kType, kDim, kWarpKeys / 8>;
  static constexpr int kColumns = kWarpKeys / 8;  // of S, in 8-key blocks

  // K and V of keys [key, key + 64), zeros from `end` on.
  UNMASK_DEVICE void copy_tile(int stage, int64_t key, int64_t end) {
    constexpr int kChunks = kDim / 8, kAtOnce = kAttentionWarps * 32 / kChunks;
    const int chunk = thread_ % kChunks;
    char* to = shared_ + stage * kStageBytes;
#pragma unroll
    for (int i = 0; i < kTileKeys / kAtOnce; ++i) {
      const int n = thread_ / kChunks + i * kAtOnce;
      const bool read = key + n < end && chunk * 8 < j_.dim;
      const int64_t slot = read ? cursor_.slot(key + n) : 0, d = read ? chunk * 8 : 0;
      char* at = to + n * kRowBytes + (chunk ^ (n & 7)) * 16;
      copy_async_16(at, k_ + slot * j_.k_stride[2] + d, read);
      copy_async_16(at + kTileBytes, v_ + slot * j_.v_stride[2] + d, read);
    }
  }

  UNMASK_DEVICE void wait_for_oldest(int stages) const {
    if (stages == 2) copy_async_wait<0>();
    else if (stages == 3) copy_async_wait<1>();
    else copy_async_wait<2>();
  }

  // This warp's keys of one tile, the first of them number `key` of the entry. Keys from `end` on are zeros in shared memory.
  UNMASK_DEVICE void attend(const char* stage, int64_t key, int64_t end) {
    if (key >= end) return;
    warp_sync();  // lanes may have parted at a border of segments
    typename Rows::Scores s;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
    score(stage, s);
    const bool whole = key + kWarpKeys <= end && key + kWarpKeys <= limits_.least;
    uint32_t seen = ~0u;
    if (!whole) seen = rows_.hide(key, end, s);
    rows_.update(s);
    typename Rows::Weights p;
    Rows::pack(s, p);
    const char* values = stage + kTileBytes;
    const bool clean = whole || !holds_invalid(values);
    if (clean) add_values<true>(values, p);
    else {
      add_values<false>(values, p);
      rows_.add_invalid(s, seen, [&](int k, int d) { return value_bits(values, key_warp_ * kWarpKeys + k, d); });
    }
  }

  // S = scale Q K^T
  UNMASK_DEVICE void score(const char* tile, typename Rows::Scores& s) const {
    const int key = key_warp_ * kWarpKeys + lane_id() / 16 * 8 + lane_id() % 8, half = lane_id() / 8 % 2;
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c) {
#pragma unroll
      for (int n = 0; n < kColumns; n += 2) {
        uint32_t b[4];
        load_matrices(b, tile + (key + n * 8) * kRowBytes + ((2 * c + half) ^ (key & 7)) * 16);
        mma_16x8x16<kType>(s[n], q_[c], b[0], b[1]);
        mma_16x8x16<kType>(s[n + 1], q_[c], b[2], b[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] *= j_.scale;
    }
  }

  // O += P V. Not clean: elements of V that are not finite count as zeros.
  template <bool kClean>
  UNMASK_DEVICE void add_values(const char* tile, const typename Rows::Weights& p) {
    const int key = key_warp_ * kWarpKeys + lane_id() / 8 % 2 * 8 + lane_id() % 8, right = lane_id() / 16;
    auto& o = rows_.outputs();
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      const uint32_t a[4] = {p[n][0], p[n][1], p[n + 1][0], p[n + 1][1]};
#pragma unroll
      for (int d = 0; d < kDim / 8; d += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, tile + (key + n * 8) * kRowBytes + ((d + right) ^ (key & 7)) * 16);
        if constexpr (!kClean) {
#pragma unroll
          for (int i = 0; i < 4; ++i) b[i] = Rows::without_invalid(b[i]);
        }
        mma_16x8x16<kType>(o[d], a, b[0], b[1]);
        mma_16x8x16<kType>(o[d + 1], a, b[2], b[3]);
      }
    }
  }

  static UNMASK_DEVICE uint32_t value_bits(const char* tile, int key, int d) {  // elements d and d + 1, d even
    return *reinterpret_cast<const uint32_t*>(tile + key * kRowBytes + ((d / 8) ^ (key & 7)) * 16 + d % 8 * 2);
  }

  // True if V of this warp's keys holds a NaN or an infinity.
  UNMASK_DEVICE bool holds_invalid(const char* tile) const {
    bool found = false;
    const char* mine = tile + key_warp_ * kWarpKeys * kRowBytes;
    for (int i = lane_id() * 16; i < kWarpKeys * kRowBytes; i += 32 * 16) {
      const Vec16 x = load16_mutable(mine + i);
#pragma unroll
      for (int w = 0; w < 4; ++w) found = found || Rows::any_invalid(x.w[w]);
    }
    return warp_ballot(found) != 0;
  }

  const AttentionJob& j_;
  char* shared_;
  SlotCursor cursor_;
  int64_t kv_head_;
  const uint16_t *k_, *v_;
  int thread_, key_warp_;
  KeyLimits limits_;
  Rows rows_;
  uint32_t q_[kDim / 16][4];
};

template <FloatType kType, int kDim, int kRowWarps>
UNMASK_KERNEL_BOUNDS(kAttentionWarps * 32, 2)
attention_tiles(const AttentionJob j) {
  using Warp = AttentionWarp<kType, kDim, kRowWarps>;
  char* shared = dynamic_shared();
  const AttentionUnit unit(j);
  const RowTile tile = find_row_tile(j, unit.number, reports_faults(j));
  if (unit.split == 0) zero_uncovered<kType>(j, tile, unit.kv_head);
  if (!tile.found) return;
  const KeyShare share(j, tile, unit.split);
  if (unit.split < share.used) Warp(j, tile, unit.kv_head, shared).run(share.first, share.end);
  else if (!kHasClusters || !j.cluster) return;
  merge_splits<kType, kDim, typename Warp::Left>(j, tile, unit, share.used, shared);
}

}  // namespace unmask::cuda
