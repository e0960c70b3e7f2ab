// What filtered_stats needs beyond common/warp.cuh: an integer sum in shared memory that any thread may add to, and sums over a block.
#pragma once
#include "common/filtered_stats.h"
#include "cuda/common/warp.cuh"

namespace unmask::cuda {

#if defined(UNMASK_EMULATE_WARP)
inline void shared_add(uint64_t* word, uint64_t value) { *word += value; }
#else
UNMASK_DEVICE void shared_add(uint64_t* word, uint64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(word), static_cast<unsigned long long>(value));
}
#endif

constexpr int kFilterWarps = 16;
constexpr int kFilterThreads = kFilterWarps * 32;
constexpr int kFilterBinBits = 11;
constexpr int kFilterBins = 1 << kFilterBinBits;

struct FilterShared {
  uint64_t bins[kFilterBins];
  uint64_t long_of_warp[kFilterWarps];
  uint64_t left;  // of a search: what of the limit is left at the bin
  Sample sample[kFilterWarps];
  Cand top[kFilterWarps][2];
  uint32_t word_of_warp[kFilterWarps];
  float number_of_warp[kFilterWarps];
  float top_of_thread[kFilterThreads];
  float floor;
  int32_t bin;  // of a search; -1: none
};

UNMASK_DEVICE int thread_in_block() { return warp_in_block() * 32 + lane_id(); }

// Each of these gives every thread the same value. They end with a barrier: the words may be written again.
UNMASK_DEVICE uint32_t block_max_u32(uint32_t v, FilterShared* s) {
  v = warp_max_u32(v);
  if (lane_id() == 0) s->word_of_warp[warp_in_block()] = v;
  block_sync();
  uint32_t all = 0;
  for (int w = 0; w < kFilterWarps; ++w) all = s->word_of_warp[w] > all ? s->word_of_warp[w] : all;
  block_sync();
  return all;
}
// In a fixed order: lanes by exchanges, then warps from the first.
UNMASK_DEVICE float block_sum(float v, FilterShared* s) {
  v = warp_sum(v);
  if (lane_id() == 0) s->number_of_warp[warp_in_block()] = v;
  block_sync();
  float all = 0.0f;
  for (int w = 0; w < kFilterWarps; ++w) all = all + s->number_of_warp[w];
  block_sync();
  return all;
}
UNMASK_DEVICE uint64_t block_sum_u64(uint64_t v, FilterShared* s) {
  for (int mask = 16; mask > 0; mask >>= 1) v += warp_get_xor(v, mask);
  if (lane_id() == 0) s->long_of_warp[warp_in_block()] = v;
  block_sync();
  uint64_t all = 0;
  for (int w = 0; w < kFilterWarps; ++w) all += s->long_of_warp[w];
  block_sync();
  return all;
}

// The item at which a running sum of integer weights passes a limit; items in the order of falling keys.
struct Found {
  bool any;
  uint32_t key;
  uint64_t left;  // the limit, less the weights of all larger keys
};

// each(f) calls f(key, weight) for the items of this thread, weight() being an integer. One histogram of 2,048 bins a level, filled by integer
// additions in any order, then a walk from the top by the first warp: three levels reach bins one key wide.
template <class Each>
UNMASK_DEVICE Found search(uint32_t low, uint32_t high, uint64_t limit, FilterShared* s, const Each& each) {
  for (;;) {
    int length = 0;
    while (length < 32 && (high - low) >> length != 0) ++length;
    const int shift = length > kFilterBinBits ? length - kFilterBinBits : 0;
    for (int b = thread_in_block(); b < kFilterBins; b += kFilterThreads) s->bins[b] = 0;
    block_sync();
    each([&](uint32_t key, const auto& weight) {
      if (key - low <= high - low) shared_add(&s->bins[(high - key) >> shift], weight());
    });
    block_sync();
    if (warp_in_block() == 0) {
      constexpr int kEach = kFilterBins / 32;
      const uint64_t* mine = s->bins + lane_id() * kEach;
      uint64_t own = 0;
      for (int b = 0; b < kEach; ++b) own += mine[b];
      uint64_t through = own;
      for (int by = 1; by < 32; by <<= 1) {
        const uint64_t other = warp_get_up(through, by);
        if (lane_id() >= by) through += other;
      }
      const uint32_t over = warp_ballot(through > limit);
      if (over == 0) {
        if (lane_id() == 0) s->bin = -1;
      } else if (lane_id() == lowest_bit(over)) {
        uint64_t left = limit - (through - own);
        int b = 0;
        while (mine[b] <= left) left -= mine[b++];
        s->bin = lane_id() * kEach + b;
        s->left = left;
      }
    }
    block_sync();
    const int32_t bin = s->bin;
    limit = s->left;
    block_sync();
    if (bin < 0) return {false, 0, 0};
    high -= static_cast<uint32_t>(bin) << shift;
    if (shift == 0) return {true, high, limit};
    const uint32_t width = (1u << shift) - 1u;
    low = high - low > width ? high - width : low;
  }
}

}  // namespace unmask::cuda
