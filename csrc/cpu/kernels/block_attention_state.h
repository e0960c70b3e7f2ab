// Running softmax state of a tile of packed rows, its merge, and the scratch of one work item.
#pragma once
#include "cpu/block_attention_kernels.h"
#include "cpu/kernels/block_attention_micro.h"

namespace unmask::cpu::UNMASK_ISA_NS {
namespace {

constexpr int kTile = 96;  // keys; a multiple of every kBlock
constexpr float kLowest = -3.402823466e38f;

UNMASK_INLINE float minus_inf() { return -__builtin_inff(); }
UNMASK_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
UNMASK_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
UNMASK_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
UNMASK_INLINE int64_t padded_dim(int64_t dim) { return round_up(dim, kPanel); }

// Per row: maximum m of the scores so far (in powers of two), sum l of 2^(s - m), and o = sum of 2^(s - m) V, padded_dim apart.
// m starts at -inf and is used as max(m, -FLT_MAX), so a row that has seen nothing stays m = -inf, l = 0 without any NaN.
struct State { float *m, *l, *o; };
UNMASK_INLINE int64_t state_floats(int64_t rows, int64_t dim) { return round_up(rows, kPanel) * (2 + padded_dim(dim)); }
UNMASK_INLINE State state_at(float* x, int64_t rows) {
  const int64_t padded = round_up(rows, kPanel);
  return {x, x + padded, x + 2 * padded};
}
inline void clear_state(State s, int64_t rows) {  // o is written before it is read
  for (int64_t r = 0; r < round_up(rows, kPanel); ++r) s.m[r] = minus_inf(), s.l[r] = 0.0f;
}

// total = merge(total, part), row by row. Rows that saw nothing in `part` are skipped: their o was never written.
inline void merge_state(State total, State part, int64_t rows, int64_t dim) {
  const int64_t ld = padded_dim(dim);
  for (int64_t r = 0; r < rows; ++r) {
    if (part.m[r] == minus_inf() && part.l[r] == 0.0f) continue;
    float* a = total.o + r * ld;
    const float* b = part.o + r * ld;
    if (total.m[r] == minus_inf() && total.l[r] == 0.0f) {
      total.m[r] = part.m[r], total.l[r] = part.l[r];
      for (int64_t d = 0; d < ld; d += kW) vstore(a + d, vload(b + d));
      continue;
    }
    const float m = part.m[r] > total.m[r] ? part.m[r] : total.m[r];
    const vf safe = vset(m > kLowest ? m : kLowest);
    const vf wa = exp2_neg(vsub(vset(total.m[r]), safe)), wb = exp2_neg(vsub(vset(part.m[r]), safe));
    float l[kW];
    vstore(l, Fp32::madd(vset(part.l[r]), wb, vmul(vset(total.l[r]), wa)));
    total.m[r] = m, total.l[r] = l[0];
    for (int64_t d = 0; d < ld; d += kW) vstore(a + d, Fp32::madd(vload(b + d), wb, vmul(vload(a + d), wa)));
  }
}

struct Scratch {
  float* q;             // Q^T panels
  float *state, *total;  // of one split, of the splits so far; total also holds Q rows before they are transposed
  float *alpha, *top;   // per row: factor of the old o, maximum of the tile
  float *s, *k, *v;     // S^T then P^T of a panel; K and V cells of a tile
  int64_t* end;         // per row: how many of the entry's keys q_end lets it see
  int64_t floats;
};
inline Scratch scratch_at(float* base, int64_t rows, int64_t dim) {
  const int64_t padded = round_up(rows, kPanel), state = state_floats(rows, dim);
  Scratch x;
  int64_t at = 0;
  const auto take = [&](int64_t n) {
    const int64_t was = at;
    at += round_up(n, 16);
    return base == nullptr ? nullptr : base + was;
  };
  x.q = take(padded * dim), x.state = take(state), x.total = take(state), x.alpha = take(padded), x.top = take(kPanel);
  x.s = take(kTile * kPanel), x.k = take(kTile * dim), x.v = take(kTile * padded_dim(dim));
  x.end = reinterpret_cast<int64_t*>(take(2 * padded));
  x.floats = at;
  return x;
}

}  // namespace
}  // namespace unmask::cpu::UNMASK_ISA_NS
