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
// Registers at D' = 128: O 64, Q 32, S 8 to 32. Q goes from global memory straight into fragments: 4 bytes a lane, once.
#pragma once
#include "cuda/block_attention_work.cuh"
#include "cuda/common/tensor_core.cuh"

namespace unmask::cuda {

// The result of one split in the workspace: outputs [rows][kDim] (not divided by the sum), then maximum and sum of each row.
template <int kDim>
struct Partial {
  float* at;
  int64_t rows;
  UNMASK_DEVICE float* o(int64_t row) const { return at + row * kDim; }
  UNMASK_DEVICE float* sums(int64_t row) const { return at + rows * kDim + row * 2; }
};

template <FloatType kType, int kDim, int kRowWarps>
class AttentionWarp {
 public:
  static constexpr int kKeyWarps = kAttentionWarps / kRowWarps;
  static constexpr int kWarpKeys = kTileKeys / kKeyWarps;  // of each tile
  static constexpr int kRows = 16 * kRowWarps;  // of the block
  static constexpr int kRowBytes = kDim * 2, kTileBytes = kTileKeys * kRowBytes, kStageBytes = 2 * kTileBytes;

  UNMASK_DEVICE AttentionWarp(const AttentionJob& j, const RowTile& tile, int64_t kv_head, char* shared)
      : j_(j), tile_(tile), shared_(shared), cursor_(j, tile.entry), kv_head_(kv_head) {
    thread_ = warp_in_block() * 32 + lane_id();
    row_warp_ = warp_in_block() / kKeyWarps, key_warp_ = warp_in_block() % kKeyWarps;
    const int64_t at[2] = {tile.cache_row * j.k_stride[0] + kv_head * j.k_stride[1],
                           tile.cache_row * j.v_stride[0] + kv_head * j.v_stride[1]};
    k_ = static_cast<const uint16_t*>(j.k) + at[0], v_ = static_cast<const uint16_t*>(j.v) + at[1];
    find_ends();
  }

  // Keys [first_key, last_key) of the entry; the block's state then lies in shared memory, see row_state().
  UNMASK_DEVICE void run(int64_t first_key, int64_t last_key) {
    const int64_t end = last_key < most_ ? last_key : most_;  // keys that any row of the tile sees
    const int64_t tiles = end > first_key ? (end - first_key + kTileKeys - 1) / kTileKeys : 0;
    const int stages = static_cast<int>(j_.stages);
    for (int s = 0; s < stages - 1; ++s) {
      if (s < tiles) copy_tile(s, first_key + s * kTileKeys, end);
      copy_async_commit();
    }
    load_queries();
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
    leave_state();
    block_sync();
  }

  // Of what the block at `shared` left: maximum of a row, over the warps that share it.
  static UNMASK_DEVICE float row_max(const char* shared, int row) {
    float m = neg_inf();
    for (int w = 0; w < kKeyWarps; ++w) m = max_drop_nan(m, left(shared, row, w)[kDim]);
    return m;
  }
  // Maximum, sum and elements [d, d + 4) of the output, not divided by the sum; warps in order.
  static UNMASK_DEVICE void row_state(const char* shared, int row, int d, float* m, float* l, float (&o)[4]) {
    *m = row_max(shared, row), *l = 0.0f;
    o[0] = o[1] = o[2] = o[3] = 0.0f;
    for (int w = 0; w < kKeyWarps; ++w) {
      const float* part = left(shared, row, w);
      const float weight = exp2_approx(part[kDim] - safe_max(*m));
      const Vec16 x = load16_mutable(part + d);
      *l = UNMASK_FMA(weight, part[kDim + 1], *l);
#pragma unroll
      for (int i = 0; i < 4; ++i) o[i] = UNMASK_FMA(weight, float_of_bits(x.w[i]), o[i]);
    }
  }

 private:
  static constexpr int kColumns = kWarpKeys / 8;  // of S, in 8-key blocks
  static constexpr int kLeftStride = kDim + 8;
  // O, then maximum and sum; rows g and g + 1 are 8 banks apart
  static UNMASK_DEVICE const float* left(const char* shared, int row, int key_warp) {
    return reinterpret_cast<const float*>(shared) + (static_cast<int64_t>(key_warp) * kRows + row) * kLeftStride;
  }

  // How many keys the tile's rows see at least and at most, and this lane's two rows.
  UNMASK_DEVICE void find_ends() {
    const int g = lane_id() / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) view_[h] = row_view(j_, tile_, row_warp_ * 16 + g + 8 * h);
    least_ = most_ = tile_.keys;
    if (j_.q_end) {
      int64_t least = tile_.keys, most = 0;
      for (int r = lane_id(); r < tile_.rows; r += 32) {
        const int64_t end = row_view(j_, tile_, r).end;
        least = end < least ? end : least, most = end > most ? end : most;
      }
      for (int by = 16; by > 0; by >>= 1) {
        const int64_t a = warp_get_xor(least, by), b = warp_get_xor(most, by);
        least = a < least ? a : least, most = b > most ? b : most;
      }
      least_ = least, most_ = most;
    }
    if (j_.mask != nullptr && tile_.keys - j_.mask_width < least_) least_ = tile_.keys - j_.mask_width;
  }

  // Fragments of Q: rows g and g + 8 of this warp's 16, zeros beyond D and beyond the tile's rows.
  UNMASK_DEVICE void load_queries() {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row_warp_ * 16 + g + 8 * h;
      const bool live = row < tile_.rows;
      const int64_t r = tile_.row_begin + (live ? row : 0);
      const uint16_t* q = static_cast<const uint16_t*>(j_.q) + (tile_.q_begin + r / j_.group) * j_.q_stride[0] +
                          (kv_head_ * j_.group + r % j_.group) * j_.q_stride[1];
#pragma unroll
      for (int c = 0; c < kDim / 8; ++c) {
        const int d = c * 8 + 2 * t;
        q_[c / 2][h + c % 2 * 2] = live && d < j_.dim ? *reinterpret_cast<const uint32_t*>(q + d) : 0u;
      }
    }
  }

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
    float s[kColumns][4];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
    score(stage, s);
    const bool whole = key + kWarpKeys <= end && key + kWarpKeys <= least_;
    uint32_t seen = ~0u;  // bit n * 4 + i: this lane's element s[n][i] is seen
    if (!whole) seen = hide(key, end, s);
    update(s);
    uint32_t p[kColumns][2];
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
      p[n][0] = packed_pair<kType>(s[n][0], s[n][1]), p[n][1] = packed_pair<kType>(s[n][2], s[n][3]);
    const bool clean = whole || !holds_invalid(stage + kTileBytes);
    if (clean) add_values<true>(stage + kTileBytes, p);
    else {
      add_values<false>(stage + kTileBytes, p);
      add_invalid(stage + kTileBytes, s, seen);
    }
  }

  // S = scale Q K^T
  UNMASK_DEVICE void score(const char* tile, float (&s)[kColumns][4]) const {
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

  // -inf for what a row does not see; returns which of this lane's scores are seen.
  UNMASK_DEVICE uint32_t hide(int64_t key, int64_t end, float (&s)[kColumns][4]) const {
    uint32_t seen = 0;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t at = key + n * 8 + lane_id() % 4 * 2 + i % 2;
        if (at < end && sees(j_, tile_, view_[i / 2], at)) seen |= 1u << (n * 4 + i);
        else s[n][i] = neg_inf();
      }
    }
    return seen;
  }

  // Scores become weights 2^(s - m); the maximum, the sum and O follow. A quad (4 lanes) holds a row's scores of the tile.
  UNMASK_DEVICE void update(float (&s)[kColumns][4]) {
    float top[2] = {m_[0], m_[1]};
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) top[i / 2] = max_drop_nan(top[i / 2], s[n][i]);
    }
    bool moved = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = max_drop_nan(top[h], warp_get_xor(top[h], 1));
      top[h] = max_drop_nan(top[h], warp_get_xor(top[h], 2));
      moved = moved || top[h] != m_[h];
    }
    if (warp_ballot(moved) != 0) {
      const float by[2] = {exp2_approx(m_[0] - safe_max(top[0])), exp2_approx(m_[1] - safe_max(top[1]))};
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o_[d][i] *= by[i / 2];
      }
      l_[0] *= by[0], l_[1] *= by[1];
      m_[0] = top[0], m_[1] = top[1];
    }
    const float m[2] = {safe_max(m_[0]), safe_max(m_[1])};
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = exp2_approx(s[n][i] - m[i / 2]);
        l_[i / 2] += s[n][i];
      }
    }
  }

  // O += P V. Not clean: elements of V that are not finite count as zeros.
  template <bool kClean>
  UNMASK_DEVICE void add_values(const char* tile, const uint32_t (&p)[kColumns][2]) {
    const int key = key_warp_ * kWarpKeys + lane_id() / 8 % 2 * 8 + lane_id() % 8, right = lane_id() / 16;
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      const uint32_t a[4] = {p[n][0], p[n][1], p[n + 1][0], p[n + 1][1]};
#pragma unroll
      for (int d = 0; d < kDim / 8; d += 2) {
        uint32_t b[4];
        load_matrices_transposed(b, tile + (key + n * 8) * kRowBytes + ((d + right) ^ (key & 7)) * 16);
        if constexpr (!kClean) {
#pragma unroll
          for (int i = 0; i < 4; ++i) b[i] &= (invalid(b[i]) ? 0u : 0xFFFFu) | (invalid(b[i] >> 16) ? 0u : 0xFFFF0000u);
        }
        mma_16x8x16<kType>(o_[d], a, b[0], b[1]);
        mma_16x8x16<kType>(o_[d + 1], a, b[2], b[3]);
      }
    }
  }

  static UNMASK_DEVICE bool invalid(uint32_t bits) {  // NaN or infinity, of the low 16 bits
    constexpr uint32_t kExponent = kType == FloatType::bf16 ? 0x7F80u : 0x7C00u;
    return (bits & kExponent) == kExponent;
  }
  static UNMASK_DEVICE uint32_t value_bits(const char* tile, int key, int d) {  // elements d and d + 1, d even
    return *reinterpret_cast<const uint32_t*>(tile + key * kRowBytes + ((d / 8) ^ (key & 7)) * 16 + d % 8 * 2);
  }

  // True if V of this warp's keys holds a NaN or an infinity, which a weight of 0 would not keep from other rows.
  UNMASK_DEVICE bool holds_invalid(const char* tile) const {
    bool found = false;
    for (int i = lane_id(); i < kWarpKeys * kDim / 2; i += 32) {
      const uint32_t x = value_bits(tile, key_warp_ * kWarpKeys + i / (kDim / 2), i % (kDim / 2) * 2);
      found = found || invalid(x) || invalid(x >> 16);
    }
    return warp_ballot(found) != 0;
  }

  // What add_values<false> left out, for the rows that see the key.
  UNMASK_DEVICE void add_invalid(const char* tile, const float (&s)[kColumns][4], uint32_t seen) {
    const int t = lane_id() % 4;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      for (int k = 0; k < 8; ++k) {
        const int from = lane_id() / 4 * 4 + k / 2;  // the lane that holds this row's weight of key k
        const uint32_t all = warp_get(seen, from);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float even = warp_get(s[n][2 * h], from), odd = warp_get(s[n][2 * h + 1], from);
          if ((all >> (n * 4 + 2 * h + k % 2) & 1u) == 0) continue;
          const float p = rounded<kType>(k % 2 == 0 ? even : odd);
#pragma unroll
          for (int d = 0; d < kDim / 8; ++d) {
            const uint32_t x = value_bits(tile, key_warp_ * kWarpKeys + n * 8 + k, d * 8 + 2 * t);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const auto bits = static_cast<uint16_t>(x >> (16 * i));
              if (invalid(bits)) o_[d][2 * h + i] += p * Element<kType>::value(bits);
            }
          }
        }
      }
    }
  }

  UNMASK_DEVICE void leave_state() const {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float l = l_[h];  // this lane's share so far
      l = l + warp_get_xor(l, 1);
      l = l + warp_get_xor(l, 2);
      float* row = const_cast<float*>(left(shared_, row_warp_ * 16 + g + 8 * h, key_warp_));
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d)
        store8(row + d * 8 + 2 * t, bits_of_float(o_[d][2 * h]), bits_of_float(o_[d][2 * h + 1]));
      if (t == 0) row[kDim] = m_[h], row[kDim + 1] = l;
    }
  }

  const AttentionJob& j_;
  const RowTile& tile_;
  char* shared_;
  SlotCursor cursor_;
  int64_t kv_head_;
  const uint16_t *k_, *v_;
  int thread_, row_warp_, key_warp_;
  int64_t least_, most_;
  RowView view_[2];
  uint32_t q_[kDim / 16][4];
  float o_[kDim / 8][4] = {};
  float m_[2] = {neg_inf(), neg_inf()}, l_[2] = {0.0f, 0.0f};
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

template <FloatType kType, int kDim, int kRowWarps>
UNMASK_KERNEL_BOUNDS(kAttentionWarps * 32, 2)
attention_tiles(const AttentionJob j) {
  constexpr int kPerRow = kDim / 4, kAtOnce = kAttentionWarps * 32 / kPerRow;
  char* shared = dynamic_shared();
  const int64_t split = block_index() % j.splits, unit = block_index() / j.splits;
  const int64_t kv_head = unit % j.kv_heads, number = unit / j.kv_heads;
  const bool reports = block_index() == 0 && warp_in_block() == 0 && j.status;
  const RowTile tile = find_row_tile(j, number, reports);
  if (split == 0) {
    zero_tokens<kType>(j, kv_head, tile.gap_begin, tile.gap_end);
    zero_tokens<kType>(j, kv_head, tile.tail_begin, j.tokens);
  }
  if (!tile.found) return;
  const int64_t each = split_keys(tile.keys, j.splits, j.min_split_keys), first_key = split * each;
  const int64_t used = tile.keys <= each ? 1 : (tile.keys + each - 1) / each;
  const bool cluster = kHasClusters && j.cluster;
  if (split >= used && !cluster) return;

  using Warp = AttentionWarp<kType, kDim, kRowWarps>;
  const int64_t end_key = first_key + each < tile.keys ? first_key + each : tile.keys;
  if (split < used) Warp(j, tile, kv_head, shared).run(first_key, end_key);
  const int thread = warp_in_block() * 32 + lane_id(), d = thread % kPerRow * 4;
  if (cluster) {  // every block merges its share of the rows, all splits in order: the same sums as through the workspace
    cluster_sync();
    const int stride = kAtOnce * static_cast<int>(j.splits);
    for (int row = thread / kPerRow + kAtOnce * static_cast<int>(split); row < tile.rows; row += stride) {
      float m = neg_inf(), l = 0.0f, o[4] = {};
      for (int s = 0; s < used; ++s) m = max_drop_nan(m, Warp::row_max(cluster_shared(shared, s), row));
      for (int s = 0; s < used; ++s) {
        float part_m, part_l, part[4];
        Warp::row_state(cluster_shared(shared, s), row, d, &part_m, &part_l, part);
        const float weight = exp2_approx(part_m - safe_max(m));
        l = UNMASK_FMA(weight, part_l, l);
#pragma unroll
        for (int i = 0; i < 4; ++i) o[i] = UNMASK_FMA(weight, part[i], o[i]);
      }
      write_row<kType>(j, tile, kv_head, row, d, m, l, o);
    }
    cluster_sync();  // a block's shared memory lives until all have read it
    return;
  }
  const auto partial = [&](int64_t s) {
    return Partial<kDim>{j.partial + (unit * j.splits + s) * j.row_tile * partial_row_floats(kDim), j.row_tile};
  };
  for (int row = thread / kPerRow; row < tile.rows; row += kAtOnce) {
    float m, l, o[4];
    Warp::row_state(shared, row, d, &m, &l, o);
    if (used == 1) {
      write_row<kType>(j, tile, kv_head, row, d, m, l, o);
      continue;
    }
    const Partial<kDim> mine = partial(split);
    store16(mine.o(row) + d, {bits_of_float(o[0]), bits_of_float(o[1]), bits_of_float(o[2]), bits_of_float(o[3])});
    if (d == 0) mine.sums(row)[0] = m, mine.sums(row)[1] = l;
  }
  if (used == 1) return;

  // The block that finishes last merges all splits, in their order.
  block_sync();
  auto* ticket = reinterpret_cast<uint32_t*>(shared);
  if (thread == 0) {
    device_fence();  // releases what the barrier has gathered from the block, and acquires for it what others released
    *ticket = device_count_up(j.tickets + unit);
    device_fence();
  }
  block_sync();
  if (*ticket != static_cast<uint32_t>(used - 1)) return;
  for (int row = thread / kPerRow; row < tile.rows; row += kAtOnce) {
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
    write_row<kType>(j, tile, kv_head, row, d, m, l, o);
  }
}

}  // namespace unmask::cuda
