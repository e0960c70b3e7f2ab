// Tensor-core products, ldmatrix and cp.async on emulated warps: the names of csrc/cuda/common/tensor_core.cuh for the host. Include after
// emulate_warp.h and cuda/common/elements.cuh.
#pragma once
#include "cuda/common/elements.cuh"

namespace unmask::cuda {

template <FloatType kType>
inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Block::Payload mine{};
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(mine.word, words, sizeof words);
  const Block::Payload* all = Block::now().exchange(20, mine);
  const auto element = [&](int lane, int word, int half) {
    uint32_t x;
    std::memcpy(&x, reinterpret_cast<const char*>(all[lane].word) + 4 * word, 4);
    return static_cast<double>(Element<kType>::value(static_cast<uint16_t>(x >> (16 * half))));
  };
  const int g = lane_id() / 4, t = lane_id() % 4;
  double sum[4] = {c[0], c[1], c[2], c[3]};  // rounded once: a GPU keeps more bits than fp32 inside one product too
  for (int k = 0; k < 16; ++k) {
    const int pair = k % 8 / 2, half = k % 2, right = k / 8;  // column k of A, row k of B
    for (int i = 0; i < 4; ++i) {
      const double x = element(g * 4 + pair, i / 2 + 2 * right, half);
      sum[i] += x * element((2 * t + i % 2) * 4 + pair, 4 + right, half);
    }
  }
  for (int i = 0; i < 4; ++i) c[i] = static_cast<float>(sum[i]);
}

inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed = false) {
  check_aligned(row, 16);
  Block::Payload mine{};
  mine.word[0] = reinterpret_cast<uint64_t>(row);
  const Block::Payload* all = Block::now().exchange(transposed ? 22 : 21, mine);
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int m = 0; m < 4; ++m) {
    uint16_t x[2];
    for (int i = 0; i < 2; ++i) {
      const int line = transposed ? 2 * t + i : g, column = transposed ? g : 2 * t + i;
      std::memcpy(&x[i], reinterpret_cast<const char*>(all[m * 8 + line].word[0]) + 2 * column, 2);
    }
    r[m] = x[0] | static_cast<uint32_t>(x[1]) << 16;
  }
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { load_matrices(r, row, true); }

inline void copy_async_16(void* to, const void* from, bool read) {
  check_aligned(to, 16);
  if (read) check_aligned(from, 16);
  Block::now().copy_later(static_cast<char*>(to), static_cast<const char*>(from), read);
}
inline void copy_async_commit() { Block::now().commit_copies(); }
template <int kPending>
inline void copy_async_wait() {
  Block::now().wait_copies(kPending);
}

template <FloatType kType>
inline uint32_t packed_pair(float low, float high) {
  return Element<kType>::bits(low) | static_cast<uint32_t>(Element<kType>::bits(high)) << 16;
}

}  // namespace unmask::cuda
