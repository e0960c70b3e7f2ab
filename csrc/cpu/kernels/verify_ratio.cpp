// verify_ratio on the CPU: one chunk of a row's sum, and one chunk of the draw at a rejected position.
//
// The sum is that of filtered_stats: 14 vector operations for kW ids, so a bf16 row is read at about DRAM speed. The draw reads both rows again
// (in cache if the vocabulary is small), takes two exponentials an id, and ten rounds of Philox for four ids where a mass of the block could win with
// the largest noise; logarithms only where a bound from the bits of the mass and of the word lets the id win. It runs once a span.
// Chunks with forbidden ids, or of rows with a column stride, are copied first, in the row's own type: the lane of an id depends only on its place.
#include "cpu/verify_ratio_kernels.h"

#include "cpu/filtered_stats_sums.h"
#include "cpu/philox_vec.h"

namespace unmask::cpu::UNMASK_ISA_NS {
namespace {

constexpr int kChunk = static_cast<int>(kStatsChunk);

UNMASK_INLINE int chunk_size(const RatioArgs& a, int64_t first) {
  return static_cast<int>(a.vocab - first < kChunk ? a.vocab - first : kChunk);
}

template <class T>
UNMASK_INLINE const T* row_of(const RatioSide& s, int64_t n) {
  return static_cast<const T*>(s.logits) + s.row[n] * s.stride[0];
}

// The chunk in place, or a copy with the forbidden ids at -inf.
template <class T>
const T* visible_chunk(const RatioArgs& a, int side, int64_t n, int64_t first, int size, T* copy) {
  const RatioSide& s = a.side[side];
  const T* x = row_of<T>(s, n) + first * s.stride[1];
  int64_t from = 0;
  while (from < a.n_forbid && a.forbid[from] < first) ++from;
  const bool forbids = from < a.n_forbid && a.forbid[from] < first + size;
  if (s.stride[1] == 1 && !forbids) return x;
  for (int i = 0; i < size; ++i) copy[i] = x[i * s.stride[1]];
  for (; from < a.n_forbid && a.forbid[from] < first + size; ++from) copy[a.forbid[from] - first] = minus_infinity(x);
  return copy;
}

template <class T>
SumExp sum_of(const RatioArgs& a, int side, int64_t n, int64_t chunk) {
  T copy[kChunk];
  float lanes[kStep];
  const int64_t first = chunk * kChunk;
  const int size = chunk_size(a, first);
  const T* x = visible_chunk(a, side, n, first, size, copy);
  chunk_max(x, size, lanes);
  return tempered_chunk(x, size, max_of(lanes), a.scale);
}

template <class T>
float logit_of(const RatioArgs& a, int side, int64_t n) {
  for (int64_t i = 0; i < a.n_forbid; ++i)
    if (a.forbid[i] == a.token[n]) return neg_inf();
  const RatioSide& s = a.side[side];
  return to_float(row_of<T>(s, n)[a.token[n] * s.stride[1]]);
}

// The key of residual noise. philox_vec.h fixes the counter's last word at 0; it enters only round 0, xored with k1[0].
UNMASK_INLINE NoiseKey residual_key(const RatioArgs& a, int64_t n) {
  NoiseKey key;
  set_key(&key, a.seed_of(n), a.pos_of(n), a.step_of(n));
  key.k1[0] ^= kResidualStream;
  return key;
}
UNMASK_INLINE void residual_words(const NoiseKey& key, uint32_t c, uint32_t* out) {
#if defined(UNMASK_PORTABLE)
  for (int i = 0; i < kPhiloxIds; i += 4) {
    const Philox4 r = philox(key.seed, c + static_cast<uint32_t>(i / 4), key.pos, key.step, kResidualStream);
    out[i] = r.x, out[i + 1] = r.y, out[i + 2] = r.z, out[i + 3] = r.w;
  }
#else
  philox_words(key, c, out);
#endif
}

constexpr int kVecs = kPhiloxIds / kW;  // of a block: the ids that philox_words makes noise for

// e^((x - m) scale) / S of the first n ids of a block, 0 behind them. Masses::at in lanes, to the same bits.
template <class T>
UNMASK_INLINE void block_masses(const T* x, int n, const Masses& of, float scale, vf* out) {
  for (int v = 0; v < kVecs; ++v) {
    const int left = n - v * kW;
    out[v] = left >= kW ? vload(x + v * kW) : left > 0 ? vload_n(x + v * kW, left, neg_inf()) : vset(neg_inf());
  }
  if (of.m == pos_inf()) {  // x - m would be NaN
    float each[kPhiloxIds];
    for (int v = 0; v < kVecs; ++v) vstore(each + v * kW, out[v]);
    for (int i = 0; i < kPhiloxIds; ++i) each[i] = of.at(each[i], scale);
    for (int v = 0; v < kVecs; ++v) out[v] = vload(each + v * kW);
    return;
  }
  static_assert(kVecs % kChains == 0, "blocks of whole chains");
  const vf m = vset(of.m), factor = vset(scale), inverse = vset(of.inverse);
  for (int v = 0; v < kVecs; v += kChains) {
    vf gap[kChains], d[kChains], e[kChains];
    tempered_exps<kChains>(out + v, m, factor, gap, d, e);
    for (int u = 0; u < kChains; ++u) out[v + u] = vmul(e[u], inverse);
  }
}

// No less than ln w + g. The bits of a float, read as a fixed-point number, are at most its log2 (plus 127), and at least that less 0.0861; with
// v = (word + 1/2) / 2^32, g <= -ln v (see score_bound in logit_stats.cpp). A mass of 0 or below comes out below every score.
UNMASK_INLINE vf residual_bound(vf w, const uint32_t* words) {
  const vf v = vbits_value(vfma(vload_half(words), vset(2.0f), vset(0.5f)));
  return vfma(vsub(vbits_value(w), v), vset(0x1.62e430p-24f), vset((32.0f + 0.0861f) * 0.69314718f + 0.01f));
}

// Best of ln w + g over a block; ids rise, so a tie stays with the earlier one.
UNMASK_INLINE void score_block(const vf* w, int64_t base, const NoiseKey& key, bool of_residual, ResidualDraw* best) {
  vf most = w[0];
  for (int v = 1; v < kVecs; ++v) most = vmax(most, w[v]);
  const float largest = vreduce_max(most);
  if (largest < kSmallestNormal || !(log_positive(largest) + kGumbelMax > best->score)) return;
  alignas(64) uint32_t words[kPhiloxIds];
  residual_words(key, static_cast<uint32_t>(base >> 2), words);
  for (int v = 0; v < kVecs; ++v) {
    if (__builtin_expect(vgt_mask(residual_bound(w[v], words + v * kW), vset(best->score)) == 0, 1)) continue;
    float mass[kW];
    vstore(mass, w[v]);
    for (int l = 0; l < kW; ++l) {
      if (mass[l] < kSmallestNormal) continue;
      const float score = log_positive(mass[l]) + gumbel_from_bits(words[v * kW + l]);
      if (score > best->score) *best = {score, static_cast<int32_t>(base + v * kW + l), of_residual};
    }
  }
}

template <class T>
ResidualDraw draw_of(const RatioArgs& a, int64_t n, int64_t chunk, const SumExp* sums) {
  T copy[2][kChunk];
  const int64_t first = chunk * kChunk;
  const int size = chunk_size(a, first);
  const T* x[2];
  for (int s = 0; s < 2; ++s) x[s] = visible_chunk(a, s, n, first, size, copy[s]);
  const Masses of[2] = {masses_of(sums[0]), masses_of(sums[1])};
  const NoiseKey key = residual_key(a, n);
  ResidualDraw best = no_draw();
  vf p[kVecs], q[kVecs];
  for (int i = 0; i < size; i += kPhiloxIds) {
    block_masses(x[0] + i, size - i, of[0], a.scale, p);
    block_masses(x[1] + i, size - i, of[1], a.scale, q);
    for (int v = 0; v < kVecs; ++v) q[v] = vsub(q[v], p[v]);
    score_block(q, first + i, key, true, &best);
  }
  if (best.id >= 0) return best;
  for (int i = 0; i < size; i += kPhiloxIds) {
    block_masses(x[1] + i, size - i, of[1], a.scale, q);
    score_block(q, first + i, key, false, &best);
  }
  return best;
}

}  // namespace

SumExp ratio_sum(const RatioArgs& args, int side, int64_t n, int64_t chunk) {
  switch (args.type) {
    case FloatType::f32: return sum_of<float>(args, side, n, chunk);
    case FloatType::bf16: return sum_of<bf16>(args, side, n, chunk);
    case FloatType::f16: return sum_of<fp16>(args, side, n, chunk);
  }
  return {quiet_nan(), quiet_nan(), quiet_nan()};
}

float ratio_logit(const RatioArgs& args, int side, int64_t n) {
  switch (args.type) {
    case FloatType::f32: return logit_of<float>(args, side, n);
    case FloatType::bf16: return logit_of<bf16>(args, side, n);
    case FloatType::f16: return logit_of<fp16>(args, side, n);
  }
  return quiet_nan();
}

ResidualDraw ratio_draw(const RatioArgs& args, int64_t n, int64_t chunk, const SumExp* sums) {
  switch (args.type) {
    case FloatType::f32: return draw_of<float>(args, n, chunk, sums);
    case FloatType::bf16: return draw_of<bf16>(args, n, chunk, sums);
    case FloatType::f16: return draw_of<fp16>(args, n, chunk, sums);
  }
  return no_draw();
}

}  // namespace unmask::cpu::UNMASK_ISA_NS
