// block_attention: out[t] = sum_j p_j V[j], p = softmax_j(scale q[t] . K[j]) over the keys j that token t sees; lse = log sum exp.
//
// Bytes: K and V of a row once per work item, 2 n D elements; Q and out once. FLOPs: 4 rows n D. With 32 packed rows that is 16 (fp32)
// or 32 (bf16) FLOP per byte, beyond the ridge of a CPU core: the design is about keeping the FMA units busy.
// Work split: batch entry x kv head x tile of packed rows (tokens x the heads of the group, so K and V are read once per group)
// x splits of 2,048 keys. Inside an item: key tiles of kTile outer, panels of 32 rows (AVX-512) inner. Per panel and tile:
//   S^T = K Q^T (lanes = rows, so the softmax has no horizontal step), running max and sum, P = 2^(S - m), O = alpha O + P V.
// K is read where it lies when it is fp32 (or bf16 with the native dot product), dense in d and evenly spaced; otherwise a block of
// keys is widened or gathered into scratch when the first panel needs it, and the other panels reuse it. V likewise.
// m starts at -inf and is used as max(m, -FLT_MAX), so a row that has seen nothing stays m = -inf, l = 0, without any NaN.
#include <math.h>
#include <stddef.h>

#include "cpu/block_attention_kernels.h"
#include "cpu/kernels/block_attention_micro.h"
#include "cpu/kernels/block_attention_pack.h"

namespace unmask::cpu::UNMASK_ISA_NS {
namespace {

constexpr int kTile = 96;  // keys; a multiple of every kBlock
constexpr float kLowest = -3.402823466e38f;
constexpr float kLn2 = 0.693147180559945309f;

UNMASK_INLINE float minus_inf() { return -__builtin_inff(); }
UNMASK_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
UNMASK_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
UNMASK_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Running (max, sum, unnormalised output) of a row tile, in powers of two.
struct State {
  float *m, *l, *o;
};
UNMASK_INLINE int64_t padded_dim(int64_t dim) { return round_up(dim, kPanel); }
UNMASK_INLINE int64_t state_floats(int64_t rows, int64_t dim) { return round_up(rows, kPanel) * (2 + padded_dim(dim)); }
UNMASK_INLINE State state_at(float* x, int64_t rows) {
  const int64_t padded = round_up(rows, kPanel);
  return {x, x + padded, x + 2 * padded};
}

struct Scratch {
  float *q, *state, *total, *alpha, *top, *s, *k, *v;
  int64_t* end;  // per row: how many of the entry's keys it sees before the mask is looked at
  int64_t floats;
};
inline Scratch layout(float* base, int64_t rows, int64_t dim) {
  const int64_t padded = round_up(rows, kPanel), state = round_up(state_floats(rows, dim), 16);
  Scratch x;
  int64_t at = 0;
  const auto take = [&](int64_t n) { float* p = base + at; at += round_up(n, 16); return p; };
  x.q = take(padded * dim), x.state = take(state), x.total = take(state), x.alpha = take(padded), x.top = take(kPanel);
  x.s = take(kTile * kPanel), x.k = take(kTile * dim), x.v = take(kTile * padded_dim(dim));
  x.end = reinterpret_cast<int64_t*>(take(2 * padded));
  x.floats = at;
  return x;
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
    vf l = Fp32::madd(vset(part.l[r]), wb, vmul(vset(total.l[r]), wa));
    float lanes[kW];
    vstore(lanes, l);
    total.m[r] = m, total.l[r] = lanes[0];
    for (int64_t d = 0; d < ld; d += kW) vstore(a + d, Fp32::madd(vload(b + d), wb, vmul(vload(a + d), wa)));
  }
}

template <class E, class T>
class Attention {
 public:
  Attention(const AttentionParams& p, const AttentionEntry& e, const AttentionItem& it, float* scratch)
      : p_(p), e_(e), it_(it), rows_(it.row_end - it.row_begin), dim_(p.dim), out_dim_(padded_dim(p.dim)),
        x_(layout(scratch, it.row_end - it.row_begin, p.dim)) {}

  template <int LD>
  void run() {
    pack_queries();
    visible_ends();
    if (it_.partial != nullptr) return split<LD>(it_.split_begin, state_at(it_.partial, rows_));
    const State state = state_at(x_.state, rows_), total = state_at(x_.total, rows_);
    split<LD>(it_.split_begin, state);
    if (it_.split_end - it_.split_begin <= 1) return finish(state);
    clear(total);
    merge_state(total, state, rows_, dim_);
    for (int64_t i = it_.split_begin + 1; i < it_.split_end; ++i) {
      split<LD>(i, state);
      merge_state(total, state, rows_, dim_);
    }
    finish(total);
  }

  // Divides by the sum and writes rows as tokens. A row that saw no score above -inf: zeros, lse -inf.
  void finish(State s) const {
    T* out = static_cast<T*>(p_.out);
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t row = it_.row_begin + r, token = e_.q_begin + row / p_.group, head = it_.head * p_.group + row % p_.group;
      const bool none = s.l[r] == 0.0f;
      const vf inverse = vset(none ? 0.0f : 1.0f / s.l[r]);
      T* y = out + (token * p_.q_heads + head) * dim_;
      const float* o = s.o + r * out_dim_;
      for (int64_t d = 0; d < dim_; d += kW) {
        const vf value = none ? vset(0.0f) : vmul(output_in_order<E>(o, d), inverse);
        if (d + kW <= dim_) vstore(y + d, value);
        else vstore_n(y + d, value, static_cast<int>(dim_ - d));
      }
      p_.lse[token * p_.q_heads + head] = none ? minus_inf() : (s.m[r] + log2f(s.l[r])) * kLn2;
    }
  }

 private:
  const AttentionParams& p_;
  const AttentionEntry& e_;
  const AttentionItem& it_;
  const int64_t rows_, dim_, out_dim_;
  Scratch x_;
  int64_t min_end_ = 0, max_end_ = 0;
  int64_t slot_[kTile];  // cache slots of the tile's keys

  static constexpr int kPerCell = E::kDot ? 2 : 1;

  void pack_queries() {
    const T* q = static_cast<const T*>(p_.q);
    const int64_t cells = dim_ / kPerCell;
    for (int64_t r = 0; r < round_up(rows_, kPanel); ++r) {
      float* column = x_.q + r / kPanel * cells * kPanel + r % kPanel;
      if (r < rows_) {
        const int64_t row = it_.row_begin + r, token = e_.q_begin + row / p_.group, head = it_.head * p_.group + row % p_.group;
        pack_query<E>(q + token * p_.q_stride[0] + head * p_.q_stride[1], p_.q_stride[2], dim_, p_.scale, column);
      } else {
        for (int64_t c = 0; c < cells; ++c) column[c * kPanel] = 0.0f;
      }
    }
  }

  int64_t token_of(int64_t r) const { return (it_.row_begin + r) / p_.group; }

  void visible_ends() {
    min_end_ = max_end_ = e_.keys;
    if (p_.q_end == nullptr) return;
    max_end_ = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t end = max64(0, min64(e_.keys, p_.q_end[(e_.q_begin + token_of(r)) * p_.q_end_stride]));
      x_.end[r] = end;
      min_end_ = min64(min_end_, end), max_end_ = max64(max_end_, end);
    }
  }

  bool visible(int64_t r, int64_t key) const {
    if (p_.q_end != nullptr && key >= x_.end[r]) return false;
    const int64_t column = key - (e_.keys - p_.mask_width);
    return e_.mask == nullptr || column < 0 || e_.mask[token_of(r) * p_.mask_stride[0] + column * p_.mask_stride[1]] != 0;
  }

  void clear(State s) const {
    for (int64_t r = 0; r < round_up(rows_, kPanel); ++r) s.m[r] = minus_inf(), s.l[r] = 0.0f;
  }

  // Slots of keys [key, key + n) of the joined segments; true if they are evenly spaced (one segment holds them all).
  bool find_slots(int64_t key, int n) {
    bool one = true;
    int i = 0;
    for (int64_t g = 0; g < e_.segments && i < n; ++g) {
      const int64_t start = e_.seg[g * e_.seg_stride], length = e_.seg[g * e_.seg_stride + e_.seg_field_stride];
      if (key >= length) { key -= length; continue; }
      one = i == 0;
      for (; key < length && i < n; ++key) slot_[i++] = start + key;
      one = one && i == n;
      key = 0;
    }
    return one;
  }

  template <int LD>
  void split(int64_t index, State state) {
    clear(state);
    const int64_t begin = index * kAttentionSplit, end = min64(max_end_, begin + kAttentionSplit);
    bool first = true;
    for (int64_t key = begin; key < end; key += kTile) {
      tile<LD>(key, static_cast<int>(min64(kTile, end - key)), state, first);
      first = false;
    }
  }

  template <int LD>
  void tile(int64_t key, int n, State state, bool first) {
    const T* k = static_cast<const T*>(p_.k) + e_.row * p_.k_stride[0] + it_.head * p_.k_stride[1];
    const T* v = static_cast<const T*>(p_.v) + e_.row * p_.v_stride[0] + it_.head * p_.v_stride[1];
    const int64_t cells = dim_ / kPerCell;
    const bool one_run = find_slots(key, n);
    const bool cells_in_place = sizeof(T) * kPerCell == 4;
    const bool k_direct = cells_in_place && one_run && p_.k_stride[3] == 1 && (LD == 0 || p_.k_stride[2] == LD * kPerCell) &&
                          p_.k_stride[2] % kPerCell == 0;
    const bool v_direct = sizeof(T) == 4 && one_run && p_.v_stride[3] == 1 && dim_ % kW == 0;
    const bool masked = min_end_ < key + n || (e_.mask != nullptr && key + n > e_.keys - p_.mask_width);
    bool k_ready = k_direct, v_ready = v_direct;
    for (int64_t r = 0; r < rows_; r += kPanel) {
      const int rows = static_cast<int>(min64(kPanel, rows_ - r));
      const float* q = x_.q + r * cells;
      for (int i = 0; i < kPanel; ++i) x_.top[i] = minus_inf();
      for (int j = 0; j < n; j += kBlock) {
        const int block = n - j < kBlock ? n - j : kBlock;
        if (!k_ready)
          for (int i = j; i < j + block; ++i) pack_row<E>(k + slot_[i] * p_.k_stride[2], p_.k_stride[3], dim_, x_.k + i * cells);
        const char* from = k_direct ? reinterpret_cast<const char*>(k + slot_[j] * p_.k_stride[2])
                                    : reinterpret_cast<const char*>(x_.k + j * cells);
        const int64_t ld = k_direct ? p_.k_stride[2] / kPerCell : cells;
        float* s = x_.s + j * kPanel;
        if (rows > kW) scores_of<E, kBlock, 2, LD>(block, q, from, ld, static_cast<int>(cells), vset(p_.scale), s, x_.top);
        else scores_of<E, kBlock, 1, LD>(block, q, from, ld, static_cast<int>(cells), vset(p_.scale), s, x_.top);
      }
      k_ready = true;
      if (masked) mask_scores(r, rows, key, n);
      softmax(r, rows, n, state);
      if (masked && has_nonfinite(v, n)) {
        careful_output(v, r, rows, key, n, state, first);
        v_ready = v_direct;  // scratch was overwritten
        continue;
      }
      output(v, r, rows, n, state, first, v_direct, v_ready);
      v_ready = true;
    }
  }

  // -inf where a row does not see a key; then the maximum anew.
  void mask_scores(int64_t r0, int rows, int64_t key, int n) {
    for (int i = 0; i < kPanel; ++i) x_.top[i] = minus_inf();
    for (int j = 0; j < n; ++j) {
      float* s = x_.s + j * kPanel;
      for (int i = 0; i < rows; ++i) {
        if (!visible(r0 + i, key + j)) s[i] = minus_inf();
        if (s[i] > x_.top[i]) x_.top[i] = s[i];
      }
    }
  }

  // P = 2^(S - m) in place (bf16 pairs along keys in the Bf16Dot engine), m, l and alpha of the panel.
  void softmax(int64_t r, int rows, int n, State state) {
    for (int c = 0; c < rows; c += kW) {
      float* s = x_.s + c;
      const vf before = vload(state.m + r + c), m = vmax(vload(x_.top + c), before), safe = vmax(m, vset(kLowest));
      const vf alpha = exp2_neg(vsub(before, safe));
      vf sum = vset(0.0f);
      if constexpr (E::kDot) {
#if defined(UNMASK_ISA_IS_AVX512BF16)
        for (int j = 0; j < n; j += 2) {
          const vf p0 = round_bf16(exp2_neg(vsub(vload(s + j * kPanel), safe)));
          const vf p1 = j + 1 < n ? round_bf16(exp2_neg(vsub(vload(s + (j + 1) * kPanel), safe))) : vset(0.0f);
          sum = vadd(vadd(sum, p0), p1);
          const __m512i pair = _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(p0.v), 16), _mm512_castps_si512(p1.v));
          _mm512_storeu_si512(s + j / 2 * kPanel, pair);
        }
#endif
      } else {
        for (int j = 0; j < n; ++j) {
          const vf p = exp2_neg(vsub(vload(s + j * kPanel), safe));
          vstore(s + j * kPanel, p);
          sum = vadd(sum, p);
        }
      }
      vstore(state.m + r + c, m);
      vstore(state.l + r + c, Fp32::madd(vload(state.l + r + c), alpha, sum));
      vstore(x_.alpha + r + c, alpha);
    }
  }

#if defined(UNMASK_ISA_IS_AVX512BF16)
  // Nearest bf16, kept as a float with a zero low half. P is never negative; a NaN keeps its quiet bit.
  UNMASK_INLINE vf round_bf16(vf x) {
    const __m512i u = _mm512_castps_si512(x.v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i y = _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7FFF));
    y = _mm512_mask_mov_epi32(y, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
    return {_mm512_castsi512_ps(_mm512_and_si512(y, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
  }
#endif

  // Cells of V columns [d, d + kPanel) for the tile's keys -> x_.v + d * (cells along keys). `skip(i)`: key i counts as zeros.
  template <class Skip>
  void pack_values(const T* v, int64_t d, int n, float* out, const Skip& skip) const {
    const int columns = static_cast<int>(min64(kPanel, dim_ - d));
    const auto row = [&](int i) { return i < n && !skip(i) ? v + slot_[i] * p_.v_stride[2] + d * p_.v_stride[3] : nullptr; };
    if constexpr (E::kDot) {
#if defined(UNMASK_ISA_IS_AVX512BF16)
      for (int i = 0; i < n; i += 2) pair_rows(row(i), row(i + 1), p_.v_stride[3], columns, out + i / 2 * kPanel);
#endif
    } else {
      for (int i = 0; i < n; ++i) widen(row(i), p_.v_stride[3], columns, kPanel, out + i * kPanel);
    }
  }

  // O = alpha O + P V for rows [r0, r0 + rows) of the panel that starts at row r.
  void accumulate(const float* v, int64_t v_step, int64_t d, int width, int64_t r, int r0, int rows, int n, State state, bool first) {
    const int depth = (n + kPerCell - 1) / kPerCell;
    for (int i = r0; i < r0 + rows; i += kBlock) {
      const int block = r0 + rows - i < kBlock ? r0 + rows - i : kBlock;
      float* o = state.o + (r + i) * out_dim_ + d;
      const float* alpha = x_.alpha + r + i;
      if (width > kW) outputs_of<E, kBlock, 2>(block, x_.s + i, v, v_step, depth, alpha, first, o, out_dim_);
      else outputs_of<E, kBlock, 1>(block, x_.s + i, v, v_step, depth, alpha, first, o, out_dim_);
    }
  }

  int width_at(int64_t d) const { return E::kDot ? kPanel : static_cast<int>(min64(kPanel, dim_ - d)); }

  void output(const T* v, int64_t r, int rows, int n, State state, bool first, bool direct, bool ready) {
    const int64_t key_cells = (n + kPerCell - 1) / kPerCell;
    for (int64_t d = 0; d < dim_; d += kPanel) {
      if (direct) {
        const float* from = reinterpret_cast<const float*>(v + slot_[0] * p_.v_stride[2] + d);
        accumulate(from, p_.v_stride[2], d, width_at(d), r, 0, rows, n, state, first);
      } else {
        float* to = x_.v + d * key_cells;
        if (!ready) pack_values(v, d, n, to, [](int) { return false; });
        accumulate(to, kPanel, d, width_at(d), r, 0, rows, n, state, first);
      }
    }
  }

  bool has_nonfinite(const T* v, int n) const {
    for (int i = 0; i < n; ++i)
      if (any_nonfinite(v + slot_[i] * p_.v_stride[2], p_.v_stride[3], dim_)) return true;
    return false;
  }

  // The tile holds a NaN or an infinity in V and keys that some rows do not see: 0 * NaN must not reach those rows. Row by row, with the
  // values of unseen keys replaced by zeros.
  void careful_output(const T* v, int64_t r, int rows, int64_t key, int n, State state, bool first) {
    for (int i = 0; i < rows; ++i)
      for (int64_t d = 0; d < dim_; d += kPanel) {
        pack_values(v, d, n, x_.v, [&](int j) { return !visible(r + i, key + j); });
        accumulate(x_.v, kPanel, d, width_at(d), r, i, 1, n, state, first);
      }
  }
};

template <class E, class T>
inline void run_item(const AttentionParams& p, const AttentionEntry& e, const AttentionItem& it, float* scratch) {
  Attention<E, T> attention(p, e, it, scratch);
  constexpr int kPerCell = E::kDot ? 2 : 1;
  if (p.dim == 128) attention.template run<128 / kPerCell>();
  else if (p.dim == 64) attention.template run<64 / kPerCell>();
  else attention.template run<0>();
}

template <class E, class T>
inline void run_merge(const AttentionParams& p, const AttentionEntry& e, const AttentionItem& it, int64_t count) {
  const int64_t rows = it.row_end - it.row_begin, step = state_floats(rows, p.dim);
  for (int64_t i = 1; i < count; ++i) merge_state(state_at(it.partial, rows), state_at(it.partial + i * step, rows), rows, p.dim);
  Attention<E, T>(p, e, it, nullptr).finish(state_at(it.partial, rows));
}

}  // namespace

int64_t block_attention_scratch(const AttentionParams& p, int64_t rows) { return layout(nullptr, rows, p.dim).floats; }
int64_t block_attention_partial(const AttentionParams& p, int64_t rows) { return state_floats(rows, p.dim); }

#if defined(UNMASK_ISA_IS_AVX512BF16)
using Bf16Engine = Bf16Dot;
#else
using Bf16Engine = Fp32;
#endif

void block_attention_item(const AttentionParams& p, const AttentionEntry& e, const AttentionItem& it, float* scratch) {
  if (p.dtype == 0) run_item<Fp32, float>(p, e, it, scratch);
  else if (p.dtype == 1) run_item<Bf16Engine, bf16>(p, e, it, scratch);
  else run_item<Fp32, fp16>(p, e, it, scratch);
}

void block_attention_merge(const AttentionParams& p, const AttentionEntry& e, const AttentionItem& it, int64_t count) {
  if (p.dtype == 0) run_merge<Fp32, float>(p, e, it, count);
  else if (p.dtype == 1) run_merge<Bf16Engine, bf16>(p, e, it, count);
  else run_merge<Fp32, fp16>(p, e, it, count);
}

}  // namespace unmask::cpu::UNMASK_ISA_NS
