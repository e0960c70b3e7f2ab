// block_attention: out[t] = sum_j p_j V[j], p = softmax_j(scale q[t] . K[j]) over the keys j that token t sees; lse = log sum exp.
//
// Bytes: K and V of a row once per work item, 2 n D elements; Q and out once. FLOPs: 4 rows n D. With 32 packed rows that is 16 (fp32)
// or 32 (bf16) FLOP per byte, beyond the ridge of a CPU core: the design is about keeping the FMA units busy.
// Work split: batch entry x kv head x tile of packed rows (tokens x the heads of the group, so K and V are read once per group)
// x splits of 2,048 keys. Inside an item: key tiles of kTile outer, panels of kPanel rows inner. Per panel and tile:
//   S^T = K Q^T (lanes = rows, so the softmax has no horizontal step), running max and sum, P = 2^(S - m), O = alpha O + P V.
// K is read where it lies when its cells are there (fp32; bf16 with the native dot product), dense in d and evenly spaced; otherwise a
// block of keys is widened or gathered into scratch when the first panel needs it, and the other panels reuse it. V likewise.
// With one panel the scratch block is reused at once, so that it never leaves L1. The first panel prefetches the next tile into L2.
#include <math.h>
#include <stddef.h>

#include "cpu/block_attention_kernels.h"
#include "cpu/kernels/block_attention_micro.h"
#include "cpu/kernels/block_attention_pack.h"
#include "cpu/kernels/block_attention_state.h"

namespace unmask::cpu::UNMASK_ISA_NS {
namespace {

constexpr float kLn2 = 0.693147180559945309f;

// LD: cells per key when K is dense and D is 64 or 128, else 0. kOrder: of d in Q, K and V cells (Fp32), of O's columns (both engines).
template <class E, class T, int LD, Order kOrder>
class Attention {
 public:
  Attention(const AttentionParams& p, const AttentionEntry& e, const AttentionItem& it, float* scratch)
      : p_(p),
        e_(e),
        it_(it),
        rows_(it.row_end - it.row_begin),
        dim_(p.dim),
        cells_(p.dim / kPerCell),
        out_dim_(padded_dim(p.dim)),
        x_(scratch_at(scratch, it.row_end - it.row_begin, p.dim)) {}

  void run() {
    pack_queries();
    visible_ends();
    if (it_.partial != nullptr) return split(it_.split_begin, state_at(it_.partial, rows_));
    const State state = state_at(x_.state, rows_), total = state_at(x_.total, rows_);
    split(it_.split_begin, state);
    if (it_.split_end - it_.split_begin <= 1) return finish(state);
    clear_state(total, rows_);
    merge_state(total, state, rows_, dim_);
    for (int64_t i = it_.split_begin + 1; i < it_.split_end; ++i) {
      split(i, state);
      merge_state(total, state, rows_, dim_);
    }
    finish(total);
  }

  // Divides by the sum and writes rows as tokens. A row that saw no score above -inf: zeros, lse -inf.
  void finish(State s) const {
    T* out = static_cast<T*>(p_.out);
    Row row = first_row();
    for (int64_t r = 0; r < rows_; ++r, row.next()) {
      const int64_t at = row.token * p_.q_heads + row.head();
      const bool none = s.l[r] == 0.0f;
      const vf inverse = vset(none ? 0.0f : 1.0f / s.l[r]);
      T* y = out + at * dim_;
      const float* o = s.o + r * out_dim_;
      for (int64_t d = 0; d < dim_; d += kW) {
        const vf value = none ? vset(0.0f) : vmul(output_in_order<kOrder>(o, d), inverse);
        if (d + kW <= dim_) vstore(y + d, value);
        else vstore_n(y + d, value, static_cast<int>(dim_ - d));
      }
      p_.lse[at] = none ? minus_inf() : (s.m[r] + log2f(s.l[r])) * kLn2;
    }
  }

 private:
  static constexpr int kPerCell = E::kDot ? 2 : 1;
  static constexpr bool kCellsInPlace = sizeof(T) * kPerCell == 4;
  static constexpr Order kInput = E::kDot ? kNatural : kOrder;

  const AttentionParams& p_;
  const AttentionEntry& e_;
  const AttentionItem& it_;
  const int64_t rows_, dim_, cells_, out_dim_;
  Scratch x_;
  int64_t min_end_ = 0, max_end_ = 0;
  int64_t slot_[kTile];  // cache slots of the tile's keys

  // Packed rows in order; a 64-bit division per row would cost more than the row of a small call.
  struct Row {
    int64_t token, lane, group, first_head;
    int64_t head() const { return first_head + lane; }
    void next() {
      if (++lane == group) lane = 0, ++token;
    }
  };
  Row first_row() const {
    const int64_t group = p_.group, r = it_.row_begin;
    return {e_.q_begin + r / group, r % group, group, it_.head * group};
  }
  int64_t token_of(int64_t r) const { return (it_.row_begin + r) / p_.group; }

  // Q^T panels; floats are scaled here (bf16 pairs cannot be: their scores are). Rows beyond the last are zeros.
  void pack_queries() {
    const T* q = static_cast<const T*>(p_.q);
    const vf scale = vset(p_.scale);
    Row at = first_row();
    for (int64_t panel = 0; panel < rows_; panel += kPanel) {
      float* rows = x_.total;
      for (int64_t r = panel; r < panel + kPanel; ++r) {
        float* row = rows + (r - panel) * cells_;
        if (r >= rows_) {
          for (int64_t c = 0; c < cells_; ++c) row[c] = 0.0f;
          continue;
        }
        pack_row<E, kInput>(q + at.token * p_.q_stride[0] + at.head() * p_.q_stride[1], p_.q_stride[2], dim_, row);
        at.next();
        if constexpr (!E::kDot) {
          int64_t c = 0;
          for (; c + kW <= cells_; c += kW) vstore(row + c, vmul(vload(row + c), scale));
          for (; c < cells_; ++c) row[c] *= p_.scale;
        }
      }
      transpose_panel(rows, cells_, x_.q + panel * cells_);
    }
  }

  void visible_ends() {
    min_end_ = max_end_ = e_.keys;
    if (p_.q_end == nullptr) return;
    max_end_ = 0;
    Row row = first_row();
    for (int64_t r = 0; r < rows_; ++r, row.next()) {
      const int64_t end = max64(0, min64(e_.keys, p_.q_end[row.token * p_.q_end_stride]));
      x_.end[r] = end;
      min_end_ = min64(min_end_, end), max_end_ = max64(max_end_, end);
    }
  }

  bool masked_out(int64_t token, int64_t key) const {
    const int64_t column = key - (e_.keys - p_.mask_width);
    return e_.mask != nullptr && column >= 0 && e_.mask[token * p_.mask_stride[0] + column * p_.mask_stride[1]] == 0;
  }
  bool visible(int64_t r, int64_t key) const {
    return !(p_.q_end != nullptr && key >= x_.end[r]) && !masked_out(token_of(r), key);
  }

  // Slots of keys [key, key + n) of the joined segments; true if one segment holds them all.
  bool find_slots(int64_t key, int n) {
    bool one = true;
    int i = 0;
    for (int64_t g = 0; g < e_.segments && i < n; ++g) {
      const int64_t start = e_.seg[g * e_.seg_stride], length = e_.seg[g * e_.seg_stride + e_.seg_field_stride];
      if (key >= length) {
        key -= length;
        continue;
      }
      one = i == 0;
      for (; key < length && i < n; ++key) slot_[i++] = start + key;
      key = 0;
    }
    return one;
  }

  void split(int64_t index, State state) {
    clear_state(state, rows_);
    const int64_t begin = index * kAttentionSplit, end = min64(max_end_, begin + kAttentionSplit);
    for (int64_t key = begin; key < end; key += kTile)
      tile(key, static_cast<int>(min64(kTile, end - key)), state, key == begin);
  }

  void tile(int64_t key, int n, State state, bool first) {
    const T* k = static_cast<const T*>(p_.k) + e_.row * p_.k_stride[0] + it_.head * p_.k_stride[1];
    const T* v = static_cast<const T*>(p_.v) + e_.row * p_.v_stride[0] + it_.head * p_.v_stride[1];
    const bool one_run = find_slots(key, n);
    const bool k_direct = kCellsInPlace && one_run && p_.k_stride[3] == 1 &&
                          (LD == 0 || p_.k_stride[2] == LD * kPerCell) && p_.k_stride[2] % kPerCell == 0;
    const bool v_direct = sizeof(T) == 4 && one_run && p_.v_stride[3] == 1 && dim_ % kW == 0;
    const bool masked = min_end_ < key + n || (e_.mask != nullptr && key + n > e_.keys - p_.mask_width);
    const bool prefetch = one_run && key + kTile < max_end_;
    bool v_ready = v_direct;
    for (int64_t r = 0; r < rows_; r += kPanel) {
      const int rows = static_cast<int>(min64(kPanel, rows_ - r));
      scores(k, r, rows, n, k_direct, prefetch);
      if (masked) mask_scores(r, rows, key, n);
      softmax(r, rows, n, state);
      if (masked && has_nonfinite(v, n)) {
        careful_output(v, r, rows, key, n, state, first);
        v_ready = v_direct;  // scratch was overwritten
        continue;
      }
      output(v, r, rows, n, state, first, v_direct, v_ready, prefetch && r == 0);
      v_ready = true;
    }
  }

  void scores(const T* k, int64_t r, int rows, int n, bool direct, bool prefetch) {
    const bool one_panel = rows_ <= kPanel, pack = !direct && r == 0;
    const int64_t ld = direct ? p_.k_stride[2] / kPerCell : cells_,
                  key_bytes = p_.k_stride[2] * static_cast<int64_t>(sizeof(T));
    for (int i = 0; i < kPanel; ++i) x_.top[i] = minus_inf();
    for (int j = 0; j < n; j += kBlock) {
      const int block = n - j < kBlock ? n - j : kBlock;
      const char* from = reinterpret_cast<const char*>(k + slot_[j] * p_.k_stride[2]);
      Prefetch next{reinterpret_cast<uintptr_t>(from), 0};
      if (prefetch && r == 0)
        next.at += static_cast<uintptr_t>(kTile * key_bytes), next.step = block * key_bytes / cells_;
      if (!direct) {
        float* packed = one_panel ? x_.k : x_.k + j * cells_;
        if (pack)
          for (int i = 0; i < block; ++i)
            pack_row<E, kInput>(k + slot_[j + i] * p_.k_stride[2], p_.k_stride[3], dim_, packed + i * cells_);
        from = reinterpret_cast<const char*>(packed);
      }
      const float* q = x_.q + r * cells_;
      const int depth = static_cast<int>(cells_);
      if (rows > kW)
        scores_of<E, kBlock, 2, LD>(block, q, from, ld, depth, vset(p_.scale), next, x_.s + j * kPanel, x_.top);
      else scores_of<E, kBlock, 1, LD>(block, q, from, ld, depth, vset(p_.scale), next, x_.s + j * kPanel, x_.top);
    }
  }

  // -inf where a row does not see a key; then the maximum anew.
  void mask_scores(int64_t r0, int rows, int64_t key, int n) {
    float limit[kPanel] = {0.0f};
    for (int i = 0; i < rows; ++i)
      limit[i] =
          p_.q_end == nullptr ? static_cast<float>(n) : static_cast<float>(max64(0, min64(n, x_.end[r0 + i] - key)));
    const int from = e_.mask == nullptr ? n : static_cast<int>(max64(0, min64(n, e_.keys - p_.mask_width - key)));
    for (int i = 0; i < rows; ++i) {
      const int64_t token = token_of(r0 + i);
      for (int j = from; j < n; ++j)
        if (masked_out(token, key + j)) x_.s[j * kPanel + i] = minus_inf();
    }
    for (int c = 0; c < kPanel; c += kW) {
      vf top = vset(minus_inf());
      const vf lim = vload(limit + c);
      for (int j = 0; j < n; ++j) {
        const vf s = keep_below(lim, static_cast<float>(j), vload(x_.s + j * kPanel + c));
        vstore(x_.s + j * kPanel + c, s);
        top = vmax(s, top);
      }
      vstore(x_.top + c, top);
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
          const vf e0 = exp2_neg(vsub(vload(s + j * kPanel), safe));
          const vf e1 = j + 1 < n ? exp2_neg(vsub(vload(s + (j + 1) * kPanel), safe)) : vset(0.0f);
          const vf p0 = round_bf16(e0), p1 = round_bf16(e1);
          sum = vadd(vadd(sum, e0), e1);  // unrounded: lse keeps fp32 accuracy
          const __m512i pair =
              _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(p0.v), 16), _mm512_castps_si512(p1.v));
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

  // Cells of V columns [d, d + kPanel) for the tile's keys. `skip(i)`: key i counts as zeros.
  template <class Skip>
  void pack_values(const T* v, int64_t d, int n, float* out, const Skip& skip) const {
    const int columns = static_cast<int>(min64(kPanel, dim_ - d));
    const int64_t stride = p_.v_stride[3];
    const auto row = [&](int i) { return v + slot_[i] * p_.v_stride[2] + d * stride; };
    if constexpr (E::kDot) {
#if defined(UNMASK_ISA_IS_AVX512BF16)
      for (int i = 0; i < n; i += 2) {
        const bf16 *x = skip(i) ? nullptr : row(i), *y = i + 1 >= n || skip(i + 1) ? nullptr : row(i + 1);
        pair_rows(x, y, stride, columns, out + i / 2 * kPanel);
      }
#endif
    } else {
      for (int i = 0; i < n; ++i) {
        float* to = out + i * kPanel;
        const int kept = skip(i) ? 0 : columns;
        if (kept != 0) widen<kInput>(row(i), stride, columns, to);
        for (int c = kept; c < kPanel; ++c) to[c] = 0.0f;
      }
    }
  }

  // O = alpha O + P V for columns [d, d + width) and rows [r0, r1) of the panel that starts at row r.
  void accumulate(const float* v, int64_t v_step, int64_t d, int64_t r, int r0, int r1, int n, State state, bool first,
                  Prefetch next) {
    const int depth = (n + kPerCell - 1) / kPerCell;
    float* o = state.o + (r + r0) * out_dim_ + d;
    const float *p = x_.s + r0, *alpha = x_.alpha + r + r0;
    if (E::kDot || dim_ - d > kW)
      outputs_of<E, kBlock, 2>(r1 - r0, p, v, v_step, depth, alpha, first, next, o, out_dim_);
    else outputs_of<E, kBlock, 1>(r1 - r0, p, v, v_step, depth, alpha, first, next, o, out_dim_);
  }

  void output(const T* v, int64_t r, int rows, int n, State state, bool first, bool direct, bool ready, bool prefetch) {
    const int64_t key_cells = (n + kPerCell - 1) / kPerCell,
                  key_bytes = p_.v_stride[2] * static_cast<int64_t>(sizeof(T));
    const int64_t blocks = (dim_ + kPanel - 1) / kPanel * ((rows + kBlock - 1) / kBlock),
                  bytes = n * key_bytes / blocks;
    const uintptr_t tile = reinterpret_cast<uintptr_t>(v + slot_[0] * p_.v_stride[2]);
    Prefetch next{tile, 0};
    if (prefetch) next.at += static_cast<uintptr_t>(kTile * key_bytes), next.step = bytes / key_cells;
    for (int64_t d = 0; d < dim_; d += kPanel) {
      if (direct) {
        const float* from = reinterpret_cast<const float*>(v + slot_[0] * p_.v_stride[2] + d);
        accumulate(from, p_.v_stride[2], d, r, 0, rows, n, state, first, next);
      } else {
        float* to = rows_ <= kPanel ? x_.v : x_.v + d * key_cells;
        if (!ready) pack_values(v, d, n, to, [](int) { return false; });
        accumulate(to, kPanel, d, r, 0, rows, n, state, first, next);
      }
      if (prefetch) next.at += static_cast<uintptr_t>(n * key_bytes * kPanel / dim_);
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
    const Prefetch none{reinterpret_cast<uintptr_t>(v), 0};
    for (int i = 0; i < rows; ++i)
      for (int64_t d = 0; d < dim_; d += kPanel) {
        pack_values(v, d, n, x_.v, [&](int j) { return !visible(r + i, key + j); });
        accumulate(x_.v, kPanel, d, r, i, i + 1, n, state, first, none);
      }
  }

#if defined(UNMASK_ISA_IS_AVX512BF16)
  // Nearest bf16, kept as a float with a zero low half. P is never negative; NaN becomes the quiet one.
  UNMASK_INLINE vf round_bf16(vf x) {
    const __m512i u = _mm512_castps_si512(x.v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i y = _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7FFF));
    y = _mm512_mask_mov_epi32(y, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
    return {_mm512_castsi512_ps(_mm512_and_si512(y, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
  }
#endif
};

// Calls f(Attention) for the dtype, the head dim and the order of d that the two imply.
template <class E, class T, Order order, class F>
inline void with_dim(const AttentionParams& p, const AttentionEntry& e, const AttentionItem& it, float* scratch,
                     const F& f) {
  constexpr int kPerCell = E::kDot ? 2 : 1;
  if (p.dim == 128) f(Attention<E, T, 128 / kPerCell, order>(p, e, it, scratch));
  else if (p.dim == 64) f(Attention<E, T, 64 / kPerCell, order>(p, e, it, scratch));
  else f(Attention<E, T, 0, order>(p, e, it, scratch));
}
template <class F>
inline void with_attention(const AttentionParams& p, const AttentionEntry& e, const AttentionItem& it, float* scratch,
                           const F& f) {
  if (p.dtype == 0) return with_dim<Fp32, float, kNatural>(p, e, it, scratch, f);
  if (p.dtype == 2) return with_dim<Fp32, fp16, kNatural>(p, e, it, scratch, f);
#if defined(UNMASK_ISA_IS_AVX512BF16)
  with_dim<Bf16Dot, bf16, kUnpack>(p, e, it, scratch, f);
#else
#if !defined(UNMASK_PORTABLE)
  if (p.dim % kPanel == 0) return with_dim<Fp32, bf16, kEvenOdd>(p, e, it, scratch, f);
#endif
  with_dim<Fp32, bf16, kNatural>(p, e, it, scratch, f);
#endif
}

}  // namespace

int64_t block_attention_scratch(const AttentionParams& p, int64_t rows) {
  return scratch_at(nullptr, rows, p.dim).floats;
}
int64_t block_attention_partial(const AttentionParams& p, int64_t rows) { return state_floats(rows, p.dim); }

void block_attention_item(const AttentionParams& p, const AttentionEntry& e, const AttentionItem& it, float* scratch) {
  with_attention(p, e, it, scratch, [](auto attention) { attention.run(); });
}

void block_attention_merge(const AttentionParams& p, const AttentionEntry& e, const AttentionItem& it, int64_t count) {
  const int64_t rows = it.row_end - it.row_begin, step = state_floats(rows, p.dim);
  const State total = state_at(it.partial, rows);
  for (int64_t i = 1; i < count; ++i) merge_state(total, state_at(it.partial + i * step, rows), rows, p.dim);
  with_attention(p, e, it, nullptr, [&](auto attention) { attention.finish(total); });
}

}  // namespace unmask::cpu::UNMASK_ISA_NS
