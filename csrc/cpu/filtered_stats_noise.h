// Philox words of a list of token ids: philox_vec.h gives them for consecutive ids; here an id has its own counter, of whose four words
// three are thrown away. A list that holds less than a quarter of a vocabulary is still cheaper.
#pragma once
#include "cpu/philox_vec.h"

namespace unmask::cpu::UNMASK_ISA_NS {

// 64-bit lanes.
#if defined(UNMASK_AVX512)
constexpr int kLongs = 8;
struct vu { __m512i v; };
UNMASK_INLINE vu uset(uint64_t x) { return {_mm512_set1_epi64(static_cast<int64_t>(x))}; }
UNMASK_INLINE vu uload(const uint64_t* p) { return {_mm512_loadu_si512(p)}; }
UNMASK_INLINE void ustore(uint64_t* p, vu a) { _mm512_storeu_si512(p, a.v); }
UNMASK_INLINE vu umul_low(vu a, vu b) { return {_mm512_mul_epu32(a.v, b.v)}; }  // of the low halves
UNMASK_INLINE vu uxor(vu a, vu b) { return {_mm512_xor_si512(a.v, b.v)}; }
UNMASK_INLINE vu uhigh(vu a) { return {_mm512_srli_epi64(a.v, 32)}; }
#elif defined(UNMASK_AVX2)
constexpr int kLongs = 4;
struct vu { __m256i v; };
UNMASK_INLINE vu uset(uint64_t x) { return {_mm256_set1_epi64x(static_cast<int64_t>(x))}; }
UNMASK_INLINE vu uload(const uint64_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
UNMASK_INLINE void ustore(uint64_t* p, vu a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
UNMASK_INLINE vu umul_low(vu a, vu b) { return {_mm256_mul_epu32(a.v, b.v)}; }
UNMASK_INLINE vu uxor(vu a, vu b) { return {_mm256_xor_si256(a.v, b.v)}; }
UNMASK_INLINE vu uhigh(vu a) { return {_mm256_srli_epi64(a.v, 32)}; }
#else
constexpr int kLongs = 1;
struct vu { uint64_t v; };
UNMASK_INLINE vu uset(uint64_t x) { return {x}; }
UNMASK_INLINE vu uload(const uint64_t* p) { return {*p}; }
UNMASK_INLINE void ustore(uint64_t* p, vu a) { *p = a.v; }
UNMASK_INLINE vu umul_low(vu a, vu b) {
  return {static_cast<uint64_t>(static_cast<uint32_t>(a.v)) * static_cast<uint32_t>(b.v)};
}
UNMASK_INLINE vu uxor(vu a, vu b) { return {a.v ^ b.v}; }
UNMASK_INLINE vu uhigh(vu a) { return {a.v >> 32}; }
#endif

constexpr int kListed = 32;  // ids at once

// out[i]: the word of ids[i].
UNMASK_INLINE void philox_words_of(const NoiseKey& key, const int32_t* ids, uint32_t* out) {
  const vu m0 = uset(0xD2511F53u), m1 = uset(0xCD9E8D57u);
  alignas(64) uint64_t word[4][kListed], counter[kListed];
  for (int i = 0; i < kListed; ++i) counter[i] = static_cast<uint32_t>(ids[i]) >> 2;
  constexpr int kAtOnce = 4 * kLongs < kListed ? 4 : kListed / kLongs, kIds = kAtOnce * kLongs;
  for (int first = 0; first < kListed; first += kIds) {
    vu c0[kAtOnce], c1[kAtOnce], c2[kAtOnce], c3[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i) {  // rounds 0 and 1, see NoiseKey
      const vu q0 = umul_low(m0, uload(counter + first + i * kLongs));
      const vu q1 = umul_low(m1, uxor(uhigh(q0), uset(key.k1[0])));
      c0[i] = uxor(uhigh(q1), uset(key.y0 ^ key.k0[1]));
      c1[i] = q1;
      c2[i] = uxor(q0, uset(key.x1));
      c3[i] = uset(key.y1);
    }
    for (int round = 2; round < 10; ++round) {
      const vu k0 = uset(key.k0[round]), k1 = uset(key.k1[round]);
      for (int i = 0; i < kAtOnce; ++i) {
        const vu p0 = umul_low(m0, c0[i]), p1 = umul_low(m1, c2[i]);
        c0[i] = uxor(uxor(uhigh(p1), c1[i]), k0);
        c2[i] = uxor(uxor(uhigh(p0), c3[i]), k1);
        c1[i] = p1;
        c3[i] = p0;
      }
    }
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = first + i * kLongs;
      ustore(&word[0][at], c0[i]);
      ustore(&word[1][at], c1[i]);
      ustore(&word[2][at], c2[i]);
      ustore(&word[3][at], c3[i]);
    }
  }
  for (int i = 0; i < kListed; ++i) out[i] = static_cast<uint32_t>(word[ids[i] & 3][i]);
}

}  // namespace unmask::cpu::UNMASK_ISA_NS
