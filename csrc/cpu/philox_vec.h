// Philox words of consecutive token ids, several counters per step. Same integers as philox() in common/philox.h.
// A counter sits in a 64-bit lane with its 32-bit words in the low halves: one widening multiply per round and side
// gives (hi, lo), and what is left in the high halves never reaches a result (the multiply and the final packing read
// low halves only).
#pragma once
#include "common/philox.h"
#include "cpu/vec.h"

namespace unmask::cpu::UNMASK_ISA_NS {

// One entry's key, with everything that does not depend on the id computed once. Counter (c, pos, step, 0): round 0
// multiplies only c by something unknown, round 1 only its c2; the other products are constants.
struct NoiseKey {
  uint64_t seed = 0;
  uint32_t pos = 0, step = 0;
  uint64_t k0[10], k1[10];      // the round keys
  uint64_t x0, y0;              // after round 0: c0 and c1, constants
  uint64_t x1, y1;              // after round 1: c2 without its c3 term, and c3
};

UNMASK_INLINE void set_key(NoiseKey* key, uint64_t seed, uint32_t pos, uint32_t step) {
  key->seed = seed;
  key->pos = pos;
  key->step = step;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    key->k0[round] = k0;
    key->k1[round] = k1;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * step;
  key->x0 = static_cast<uint32_t>(p1 >> 32) ^ pos ^ key->k0[0];
  key->y0 = static_cast<uint32_t>(p1);
  const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * key->x0;
  key->x1 = static_cast<uint32_t>(p0 >> 32) ^ key->k1[1];
  key->y1 = static_cast<uint32_t>(p0);
}

#if defined(UNMASK_AVX512)
#define UNMASK_EACH for (int i = 0; i < kPhiloxChains; ++i)
constexpr int kPhiloxChains = 4, kPhiloxIds = 32 * kPhiloxChains;
// words of ids [4 c, 4 c + kPhiloxIds)
UNMASK_INLINE void philox_words(const NoiseKey& key, uint32_t c, uint32_t* out) {
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
  __m512i c0[kPhiloxChains], c1[kPhiloxChains], c2[kPhiloxChains], c3[kPhiloxChains], p0[kPhiloxChains],
      p1[kPhiloxChains];
  for (int i = 0; i < kPhiloxChains; ++i) {
    const __m512i n = _mm512_add_epi64(_mm512_set1_epi64(c + 8 * i), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
    const __m512i q0 = _mm512_mul_epu32(m0, n);
    const __m512i q1 = _mm512_mul_epu32(m1, _mm512_xor_si512(_mm512_srli_epi64(q0, 32), _mm512_set1_epi64(key.k1[0])));
    c0[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(q1, 32), _mm512_set1_epi64(key.y0),
                                      _mm512_set1_epi64(key.k0[1]), 0x96);
    c1[i] = q1;
    c2[i] = _mm512_xor_si512(q0, _mm512_set1_epi64(key.x1));
    c3[i] = _mm512_set1_epi64(key.y1);
  }
  for (int round = 2; round < 10; ++round) {
    const __m512i k0 = _mm512_set1_epi64(key.k0[round]), k1 = _mm512_set1_epi64(key.k1[round]);
    UNMASK_EACH p0[i] = _mm512_mul_epu32(m0, c0[i]);
    UNMASK_EACH p1[i] = _mm512_mul_epu32(m1, c2[i]);
    UNMASK_EACH c0[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1[i], 32), c1[i], k0, 0x96);
    UNMASK_EACH c2[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0[i], 32), c3[i], k1, 0x96);
    UNMASK_EACH c1[i] = p1[i];
    UNMASK_EACH c3[i] = p0[i];
  }
  const __m512i lo = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), hi = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  for (int i = 0; i < kPhiloxChains; ++i) {
    const __m512i a = _mm512_mask_blend_epi32(0xAAAA, c0[i], _mm512_slli_epi64(c1[i], 32));  // x | y << 32
    const __m512i b = _mm512_mask_blend_epi32(0xAAAA, c2[i], _mm512_slli_epi64(c3[i], 32));  // z | w << 32
    _mm512_storeu_si512(out + 32 * i, _mm512_permutex2var_epi64(a, lo, b));
    _mm512_storeu_si512(out + 32 * i + 16, _mm512_permutex2var_epi64(a, hi, b));
  }
}
#undef UNMASK_EACH
#elif defined(UNMASK_AVX2)
constexpr int kPhiloxIds = 32;
UNMASK_INLINE void philox_words(const NoiseKey& key, uint32_t c, uint32_t* out) {
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
  __m256i c0[2], c1[2], c2[2], c3[2];
  for (int i = 0; i < 2; ++i) {
    const __m256i n = _mm256_add_epi64(_mm256_set1_epi64x(c + 4 * i), _mm256_set_epi64x(3, 2, 1, 0));
    const __m256i p0 = _mm256_mul_epu32(m0, n);
    const __m256i p1 = _mm256_mul_epu32(m1, _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_set1_epi64x(key.k1[0])));
    c0[i] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_set1_epi64x(key.y0 ^ key.k0[1]));
    c1[i] = p1;
    c2[i] = _mm256_xor_si256(p0, _mm256_set1_epi64x(key.x1));
    c3[i] = _mm256_set1_epi64x(key.y1);
  }
  for (int round = 2; round < 10; ++round) {
    for (int i = 0; i < 2; ++i) {
      const __m256i p0 = _mm256_mul_epu32(m0, c0[i]), p1 = _mm256_mul_epu32(m1, c2[i]);
      c0[i] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1[i]), _mm256_set1_epi64x(key.k0[round]));
      c2[i] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3[i]), _mm256_set1_epi64x(key.k1[round]));
      c1[i] = p1;
      c3[i] = p0;
    }
  }
  for (int i = 0; i < 2; ++i) {
    const __m256i a = _mm256_blend_epi32(c0[i], _mm256_slli_epi64(c1[i], 32), 0xAA);
    const __m256i b = _mm256_blend_epi32(c2[i], _mm256_slli_epi64(c3[i], 32), 0xAA);
    const __m256i even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);  // counters 0, 2 and 1, 3
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * i), _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * i + 8), _mm256_permute2x128_si256(even, odd, 0x31));
  }
}
#else
constexpr int kPhiloxIds = 8;
UNMASK_INLINE void philox_words(const NoiseKey& key, uint32_t c, uint32_t* out) {
  for (uint32_t i = 0; i < 2; ++i, out += 4) {
    const Philox4 r = philox(key.seed, c + i, key.pos, key.step, 0u);
    out[0] = r.x;
    out[1] = r.y;
    out[2] = r.z;
    out[3] = r.w;
  }
}
#endif

}  // namespace unmask::cpu::UNMASK_ISA_NS
