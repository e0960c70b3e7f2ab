// Counter-based randomness for every backend: Philox4x32-10 (Salmon et al., SC11), key = the row's seed, counter = (id // 4, pos, step, 0).
// One header for CPU (every ISA) and CUDA; integer arithmetic and explicit fma only, so equal inputs give equal bits everywhere.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define UNMASK_HD __host__ __device__ __forceinline__
#else
#define UNMASK_HD inline __attribute__((always_inline))
#endif

namespace unmask {

struct Philox4 { uint32_t x, y, z, w; };

UNMASK_HD Philox4 philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// 32 random bits -> float in (0, 1): 23 bits and a half step, exact in float32, never 0 or 1.
UNMASK_HD float uniform_from_bits(uint32_t w) { return (static_cast<float>(w >> 9) + 0.5f) * 0x1p-23f; }

}  // namespace unmask
