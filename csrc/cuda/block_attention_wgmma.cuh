// block_attention on Hopper (sm_90a), variant A: up to 64 packed rows of an entry; bf16 and fp16, D up to 128. tests run this code on
// emulated warps.
//
// Formula, bytes and FLOPs: block_attention_mma.cuh. What differs is how a tile travels and multiplies: TMA brings it (one thread asks,
// nobody computes addresses), and wgmma reads it where it lies.
// Work split: block = 64 packed rows x kv head x split of the keys; its 4 warps are one warpgroup, warp w holds rows 16 w .. 16 w + 15 of Q,
// S, P and O in registers (32 + 32 + 16 + 64 at D' = 128). Two blocks a multiprocessor: while one is at its softmax the other's products
// run. No fifth warp to ask for tiles: with it, registers would end at 168 a thread (3 warps in a quarter of the multiprocessor) and these
// do not fit. Warps without rows (a block of 32 tokens, MHA) take part in the products and skip the rest.
// Layout: a ring of slots of 64 keys x D' (8 KB for every 64 of D'), filled K, V, K, V, ... ; K is read K-major, V MN-major. A tile holds
// neighbouring slots of the cache, so tiles start anew at each segment (segments that continue each other count as one).
// Order of a step: weights of S -> O += P V and S of the next tile are started -> slots that were free before this step are asked for (every
// warp has let go of them by then, most likely) -> the products are ready, their slots free.
#pragma once
#include "cuda/block_attention_rows.cuh"
#include "cuda/common/hopper.cuh"

namespace unmask::cuda {

// The tensor maps: [D, S, Hkv, R] (innermost first) in boxes of 64 x 64.
struct WgmmaJob {
  TensorMap k, v;
  AttentionJob job;
};

// Keys [first, last) of an entry in tiles of up to 64 whose slots are neighbours.
class KeyTiles {
 public:
  int32_t key = 0, count = 0, slot = 0;  // the tile: keys [key, key + count) of the entry, in slots from `slot` on

  UNMASK_DEVICE KeyTiles(const AttentionJob& j, int64_t entry, int64_t first, int64_t last)
      : seg_(j.seg + entry * j.seg_stride[0]),
        step_(j.seg_stride[1]),
        field_(j.seg_stride[2]),
        left_(static_cast<int32_t>(j.segments)),
        next_(static_cast<int32_t>(first)),
        last_(static_cast<int32_t>(last)) {}

  UNMASK_DEVICE bool next() {
    if (next_ >= last_) return false;
    while (next_ >= run_end_) next_run();
    key = next_, slot = run_start_ + (next_ - run_begin_);
    const int32_t end = run_end_ < last_ ? run_end_ : last_;
    count = end - next_ < kTileKeys ? end - next_ : kTileKeys;
    next_ += count;
    return true;
  }

 private:
  // `last` is at most the number of keys in all segments, so there is one.
  UNMASK_DEVICE void next_run() {
    run_begin_ = run_end_;
    run_start_ = static_cast<int32_t>(seg_[0]);
    do {
      run_end_ += static_cast<int32_t>(seg_[field_]);
      seg_ += step_, --left_;
    } while (left_ > 0 && seg_[0] == run_start_ + (run_end_ - run_begin_));
  }

  const int64_t* seg_;
  int64_t step_, field_;
  int32_t left_, next_, last_, run_begin_ = 0, run_end_ = 0, run_start_ = 0;
};

// The ring's memory: tiles from a multiple of 1,024 bytes on, then two barriers a slot.
template <int kDim>
struct AttentionRing {
  static constexpr int kHalves = kDim / kAtomElements, kHalfBytes = kTileKeys * kAtomRow,
                       kTileBytes = kHalves * kHalfBytes;
  char* memory;
  int slots;

  UNMASK_DEVICE char* tile(const RingPlace& at) const { return memory + at.slot * kTileBytes; }
  UNMASK_DEVICE uint64_t* full(int slot) const {
    return reinterpret_cast<uint64_t*>(memory + slots * kTileBytes) + 2 * slot;
  }
  UNMASK_DEVICE uint64_t* empty(int slot) const { return full(slot) + 1; }
};

// One thread's walk over the ring: K and V of every tile.
template <int kDim>
class TileSource {
 public:
  using Ring = AttentionRing<kDim>;

  UNMASK_DEVICE TileSource(const WgmmaJob& w, const RowTile& tile, int64_t kv_head, const Ring& ring,
                           const KeyTiles& tiles)
      : w_(w),
        ring_(ring),
        tiles_(tiles),
        kv_head_(static_cast<int>(kv_head)),
        row_(static_cast<int>(tile.cache_row)) {}

  // Asks for K or V, whichever is next, until `most` were asked for in all.
  UNMASK_DEVICE void ask(int most) {
    for (; asked_ < most; ++asked_) {
      const bool k = asked_ % 2 == 0;
      if (k && !tiles_.next()) {
        asked_ = INT32_MAX;
        return;
      }
      barrier_wait(ring_.empty(at_.slot), at_.phase ^ 1u);
      uint64_t* full = ring_.full(at_.slot);
      barrier_arrive_expecting(full, Ring::kTileBytes);
#pragma unroll
      for (int h = 0; h < Ring::kHalves; ++h)
        copy_box(ring_.tile(at_) + h * Ring::kHalfBytes, k ? &w_.k : &w_.v, h * kAtomElements, tiles_.slot, kv_head_,
                 row_, full);
      at_.advance(ring_.slots);
    }
  }

 private:
  const WgmmaJob& w_;
  const Ring& ring_;
  KeyTiles tiles_;
  const int kv_head_, row_;
  RingPlace at_;
  int asked_ = 0;
};

template <FloatType kType, int kDim>
class AttentionGroup {
 public:
  using Ring = AttentionRing<kDim>;
  using Left = LeftRows<kDim, 64, 1>;

  UNMASK_DEVICE AttentionGroup(const AttentionJob& j, const RowTile& tile, const Ring& ring, const KeyLimits& limits)
      : scale_(j.scale),
        ring_(ring),
        least_(limits.least),
        idle_(warp_in_block() * 16 >= tile.rows),
        rows_(j, tile, warp_in_block() * 16) {}

  UNMASK_DEVICE void run(int64_t kv_head, KeyTiles tiles, TileSource<kDim>& source) {
    const bool asks = warp_in_block() == 0 && lane_id() == 0;
    int freed = 0;
    if (asks) source.ask(ring_.slots);
    warp_sync();
    rows_.load_queries(kv_head, q_);
    bool more = tiles.next();
    if (more) {
      barrier_wait(ring_.full(at_.slot), at_.phase);
      products_begin();
      score(at_);
      products_commit();
      products_wait<0>();
      settled(s_);
      free_slot(at_);
      at_.advance(ring_.slots);
      freed = 1;
    }
    while (more) {
      const int64_t key = tiles.key, end = key + tiles.count;
      const bool whole = tiles.count == kTileKeys && end <= least_;
      uint32_t seen = ~0u;
      if (!idle_) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) s_[n][i] *= scale_;
        }
        if (!whole) seen = rows_.hide(key, end, s_);
        rows_.update(s_);
        Rows::pack(s_, p_);
      }
      barrier_wait(ring_.full(at_.slot), at_.phase);  // V
      if (!whole) keep_invalid_out(ring_.tile(at_), seen);
      const RingPlace values = at_;
      at_.advance(ring_.slots);
      more = tiles.next();
      if (more) {
        barrier_wait(ring_.full(at_.slot), at_.phase);  // the next K
        settled(s_);
        settled(p_);
        settled(rows_.outputs());
        products_begin();
        add_values(values);
        score(at_);
        products_commit();
        if (asks) source.ask(freed + ring_.slots);
        warp_sync();
        products_wait<0>();
        settled(s_);
        free_slot(at_);
        at_.advance(ring_.slots);
      } else {
        settled(p_);
        settled(rows_.outputs());
        products_begin();
        add_values(values);
        products_commit();
        products_wait<0>();
      }
      settled(rows_.outputs());
      free_slot(values);
      freed += 2;
    }
  }

  UNMASK_DEVICE void leave(char* shared) const {
    rows_.leave([&](int row) { return const_cast<float*>(Left::at(shared, row, 0)); });
  }

 private:
  static constexpr int kColumns = kTileKeys / 8;
  static constexpr int kInvalidBarrier = 1;  // hardware barrier of the warpgroup
  using Rows = AttentionRows<kType, kDim, kColumns>;

  // S = Q K^T, started
  UNMASK_DEVICE void score(const RingPlace& at) {
    const uint32_t k = shared_address(ring_.tile(at));
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c)
      product<kType, false>(s_, q_[c], matrix_descriptor(k + c / 4 * Ring::kHalfBytes + c % 4 * 32, 16), c > 0);
  }

  // O += P V, started
  UNMASK_DEVICE void add_values(const RingPlace& at) {
    const uint32_t v = shared_address(ring_.tile(at));
#pragma unroll
    for (int c = 0; c < kTileKeys / 16; ++c) {
      const uint32_t a[4] = {p_[2 * c][0], p_[2 * c][1], p_[2 * c + 1][0], p_[2 * c + 1][1]};
      product<kType, true>(rows_.outputs(), a, matrix_descriptor(v + c * 16 * kAtomRow, Ring::kHalfBytes), true);
    }
  }

  // The warp is done with a slot.
  UNMASK_DEVICE void free_slot(const RingPlace& at) const {
    warp_sync();
    if (lane_id() == 0) barrier_arrive(ring_.empty(at.slot));
  }

  // Some row does not see some key of this V (a tile may also hold slots of no segment). An element that is not finite would reach that
  // row through a weight of 0: it is added to the rows that see it, then becomes a zero for the product.
  UNMASK_DEVICE void keep_invalid_out(char* values, uint32_t seen) {
    constexpr int kBytes = Ring::kTileBytes, kStep = kWarpgroupThreads * 16;
    const int mine = (warp_in_block() * 32 + lane_id()) * 16;
    bool found = false;
    for (int i = mine; i < kBytes; i += kStep) {
      const Vec16 x = load16_mutable(values + i);
#pragma unroll
      for (int w = 0; w < 4; ++w) found = found || Rows::any_invalid(x.w[w]);
    }
    if (!group_any(kInvalidBarrier, kWarpgroupThreads, found)) return;
    if (!idle_)
      rows_.add_invalid(s_, seen, [&](int k, int d) {
        return *reinterpret_cast<const uint32_t*>(values + d / kAtomElements * Ring::kHalfBytes +
                                                  swizzled(k, d % kAtomElements));
      });
    group_any(kInvalidBarrier, kWarpgroupThreads, false);  // all have read
    for (int i = mine; i < kBytes; i += kStep) {
      Vec16 x = load16_mutable(values + i);
#pragma unroll
      for (int w = 0; w < 4; ++w) x.w[w] = Rows::without_invalid(x.w[w]);
      store16(values + i, x);
    }
    fence_for_products();
    group_any(kInvalidBarrier, kWarpgroupThreads, false);
  }

  const float scale_;
  const Ring& ring_;
  const int64_t least_;
  const bool idle_;  // no rows: weights stay 0
  RingPlace at_;
  Rows rows_;
  uint32_t q_[kDim / 16][4];
  typename Rows::Scores s_ = {};
  typename Rows::Weights p_ = {};
};

template <FloatType kType, int kDim>
UNMASK_KERNEL_BOUNDS(kAttentionWarps * 32, 2)
attention_wgmma(const UNMASK_GRID_CONSTANT WgmmaJob w) {
  using Group = AttentionGroup<kType, kDim>;
  const AttentionJob& j = w.job;
  char* shared = dynamic_shared();
  const AttentionRing<kDim> ring{shared, static_cast<int>(j.stages)};
  if (warp_in_block() == 0 && lane_id() == 0) {
    prefetch_map(&w.k);
    prefetch_map(&w.v);
    for (int s = 0; s < ring.slots; ++s) {
      barrier_init(ring.full(s), 1);
      barrier_init(ring.empty(s), kAttentionWarps);
    }
    barrier_init_done();
  }
  const AttentionUnit unit(j);
  const RowTile tile = find_row_tile(j, unit.number, reports_faults(j));
  if (unit.split == 0) zero_uncovered<kType>(j, tile, unit.kv_head);
  if (!tile.found) return;  // the whole block, and all of its cluster
  const KeyShare share(j, tile, unit.split);
  if (unit.split < share.used) {
    const KeyLimits limits = key_limits(j, tile);
    const KeyTiles tiles(j, tile.entry, share.first, share.end < limits.most ? share.end : limits.most);
    TileSource<kDim> source(w, tile, unit.kv_head, ring, tiles);
    Group group(j, tile, ring, limits);
    block_sync();  // the barriers are there
    group.run(unit.kv_head, tiles, source);
    block_sync();  // every product has read its tiles: they become the place where rows are left
    group.leave(shared);
    block_sync();
  } else if (!j.cluster) {
    return;
  }
  merge_splits<kType, kDim, typename Group::Left>(j, tile, unit, share.used, shared);
}

}  // namespace unmask::cuda
