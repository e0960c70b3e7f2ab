// Register-blocked products of block_attention, and the power of two of its softmax.
//
// Everything is counted in 32-bit cells. In the Fp32 engine a cell is one float; in the Bf16Dot engine it is a pair of bf16 that lie
// next to each other along the summed dimension (d for Q K^T, keys for P V), and one instruction multiplies 16 pairs with 16 pairs.
//
//   scores   S^T[key][row] += K[key][c] * Q^T[c][row]      lanes = packed query rows, K cells broadcast from the cache's own layout
//   output     O[row][d]   += P^T[key][row] * V[key][d]    lanes = d, P cells broadcast
//
// so neither K nor P nor (fp32) V is ever transposed: Q is, once per work item. A panel is kPanel = 2 vectors of rows or of d.
// Every output element is one chain of fma in increasing order of the summed index, whatever the block that computes it: results do not
// depend on how rows are grouped.
#pragma once
#include "cpu/vec.h"

namespace unmask::cpu::UNMASK_ISA_NS {
namespace {

#define UNMASK_INLINE_MEMBER inline __attribute__((always_inline))

constexpr int kPanel = 2 * kW;
#if defined(UNMASK_AVX512)
constexpr int kBlock = 12;  // 12 x 2 accumulators + 2 loads + 1 broadcast of 32 registers
#elif defined(UNMASK_AVX2)
constexpr int kBlock = 6;  // 6 x 2 + 2 + 1 of 16
#else
constexpr int kBlock = 4;
#endif

UNMASK_INLINE vf load_cell(const char* p) {
  float f;
  __builtin_memcpy(&f, p, 4);
  return vset(f);
}

// Addresses to bring into L2 while a block computes: the same keys of the next tile. Never dereferenced, may point anywhere.
struct Prefetch {
  uintptr_t at;
  int64_t step;  // bytes per iteration
  UNMASK_INLINE_MEMBER void go() {
    __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
    at += static_cast<uintptr_t>(step);
  }
};

struct Fp32 {
  static constexpr bool kDot = false;
  UNMASK_INLINE vf madd(vf a, vf b, vf c) {
#if defined(UNMASK_PORTABLE) && !defined(__FP_FAST_FMAF)
    return vadd(vmul(a, b), c);  // fmaf would be a library call
#else
    return vfma(a, b, c);
#endif
  }
};

#if defined(UNMASK_ISA_IS_AVX512BF16)
struct Bf16Dot {
  static constexpr bool kDot = true;
  UNMASK_INLINE vf madd(vf a, vf b, vf c) {
#if defined(UNMASK_EMULATE_BF16)
    // vdpbf16ps on a CPU without it: odd elements first, then even ones.
    const __m512i top = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    const __m512i ai = _mm512_castps_si512(a.v), bi = _mm512_castps_si512(b.v);
    const __m512 odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(ai, top)),
                                       _mm512_castsi512_ps(_mm512_and_si512(bi, top)), c.v);
    return {_mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(ai, 16)),
                            _mm512_castsi512_ps(_mm512_slli_epi32(bi, 16)), odd)};
#else
    return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
#endif
  }
};
#endif

// S^T block: MR keys x NV row vectors. q: [depth][kPanel]; k: the first key's cells, keys `ld` cells apart (LD when it is known);
// s: [MR][kPanel]; top: running maximum over keys, per row. NaN scores do not enter it. `next` advances by next.step per iteration.
template <class E, int MR, int NV, int LD>
UNMASK_INLINE void score_block(const float* q, const char* k, int64_t ld, int depth, vf scale, Prefetch next, float* s,
                               float* top) {
  const int64_t step = 4 * (LD ? LD : ld);
  vf acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[i][v] = vset(0.0f);
#pragma GCC unroll 2
  for (int c = 0; c < depth; ++c) {
    next.go();
    vf b[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) b[v] = vload(q + c * kPanel + v * kW);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const vf a = load_cell(k + i * step + 4 * c);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[i][v] = E::madd(a, b[v], acc[i][v]);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    vf m = vload(top + v * kW);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const vf x = E::kDot ? vmul(acc[i][v], scale) : acc[i][v];
      vstore(s + i * kPanel + v * kW, x);
      m = vmax(x, m);
    }
    vstore(top + v * kW, m);
  }
}

// O block: MR rows x NV vectors of d. o = (first ? 0 : alpha[row] * o) + sum over `depth` cells of p[c][row] * v[c][d].
// p: first row of the block, cells kPanel apart; v: [depth] cells `v_step` floats apart; o: rows `ld` floats apart.
template <class E, int MR, int NV>
UNMASK_INLINE void output_block(const float* p, const float* v, int64_t v_step, int depth, const float* alpha,
                                bool first, Prefetch next, float* o, int64_t ld) {
  vf acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int x = 0; x < NV; ++x) acc[i][x] = first ? vset(0.0f) : vmul(vload(o + i * ld + x * kW), vset(alpha[i]));
#pragma GCC unroll 2
  for (int c = 0; c < depth; ++c) {
    next.go();
    vf b[NV];
#pragma GCC unroll 2
    for (int x = 0; x < NV; ++x) b[x] = vload(v + x * kW);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const vf a = vset(p[i]);
#pragma GCC unroll 2
      for (int x = 0; x < NV; ++x) acc[i][x] = E::madd(a, b[x], acc[i][x]);
    }
    v += v_step;
    p += kPanel;
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int x = 0; x < NV; ++x) vstore(o + i * ld + x * kW, acc[i][x]);
}

// The same for any n: blocks of 12, 8, 4, 2, 1 (AVX2: 6, 4, 2, 1), few sizes because each is code of its own.
constexpr int smaller_block(int rows) { return rows > 8 ? 8 : rows > 4 ? 4 : rows / 2; }

template <class E, int MR, int NV, int LD>
inline void scores_of(int n, const float* q, const char* k, int64_t ld, int depth, vf scale, Prefetch next, float* s,
                      float* top) {
  for (; n >= MR; n -= MR) {
    score_block<E, MR, NV, LD>(q, k, ld, depth, scale, next, s, top);
    k += 4 * MR * ld;
    s += MR * kPanel;
  }
  if constexpr (MR > 1) {
    if (n > 0) scores_of<E, smaller_block(MR), NV, LD>(n, q, k, ld, depth, scale, next, s, top);
  }
}
template <class E, int MR, int NV>
inline void outputs_of(int n, const float* p, const float* v, int64_t v_step, int depth, const float* alpha, bool first,
                       Prefetch next, float* o, int64_t ld) {
  for (; n >= MR; n -= MR) {
    output_block<E, MR, NV>(p, v, v_step, depth, alpha, first, next, o, ld);
    next.at += static_cast<uintptr_t>(next.step * depth);
    p += MR;
    alpha += MR;
    o += MR * ld;
  }
  if constexpr (MR > 1) {
    if (n > 0) outputs_of<E, smaller_block(MR), NV>(n, p, v, v_step, depth, alpha, first, next, o, ld);
  }
}

// x where limit > j, else -inf, per lane.
UNMASK_INLINE vf keep_below(vf limit, float j, vf x) {
#if defined(UNMASK_AVX512)
  return {_mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()),
                             _mm512_cmp_ps_mask(limit.v, _mm512_set1_ps(j), _CMP_GT_OQ), x.v)};
#elif defined(UNMASK_AVX2)
  return {
      _mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), x.v, _mm256_cmp_ps(limit.v, _mm256_set1_ps(j), _CMP_GT_OQ))};
#else
  vf r;
  for (int i = 0; i < kW; ++i) r.v[i] = limit.v[i] > j ? x.v[i] : -__builtin_inff();
  return r;
#endif
}

// 2^y for y <= 0. y = n + r with n = round(y): 2^r by the polynomial with the least relative error on [-1/2, 1/2] and constant term 1
// (9e-8, so 2^0 is exactly 1), times 2^n from the bits of y + kMagic. Below -127: exactly 0. NaN stays NaN.
UNMASK_INLINE vf exp2_neg(vf y) {
  const vf magic = vset(0x1.8p23f + 127.0f);
  y = vmax(vset(-127.0f), y);
  const vf t = vadd(y, magic);
  const vf r = vsub(y, vsub(t, magic));
  vf p = vset(0x1.5bba14p-10f);
  p = Fp32::madd(p, r, vset(0x1.3cea88p-7f));
  p = Fp32::madd(p, r, vset(0x1.c6b752p-5f));
  p = Fp32::madd(p, r, vset(0x1.ebf9bcp-3f));
  p = Fp32::madd(p, r, vset(0x1.62e42ap-1f));
  p = Fp32::madd(p, r, vset(1.0f));
  return vmul(p, vshl23(t));
}

}  // namespace
}  // namespace unmask::cpu::UNMASK_ISA_NS
