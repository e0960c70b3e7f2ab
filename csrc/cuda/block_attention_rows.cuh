// What a warp of the tile kernels of block_attention holds in registers, whichever instruction multiplies: 16 packed rows' running
// maximum, sum and output as fragments (rows g and g + 8, columns 8 n + 2 t and the next; g = lane / 4, t = lane % 4), which m16n8k16 and
// the four warps of wgmma share.
#pragma once
#include "cuda/block_attention_merge.cuh"
#include "cuda/common/tensor_core.cuh"

namespace unmask::cuda {

// How many keys the rows of a tile see at least (all of them) and at most (any of them). Every lane returns the same.
struct KeyLimits { int64_t least, most; };

UNMASK_DEVICE KeyLimits key_limits(const AttentionJob& j, const RowTile& tile) {
  KeyLimits out{tile.keys, tile.keys};
  if (j.q_end) {
    out.most = 0;
    for (int r = lane_id(); r < tile.rows; r += 32) {
      const int64_t end = row_view(j, tile, r).end;
      out.least = end < out.least ? end : out.least, out.most = end > out.most ? end : out.most;
    }
    for (int by = 16; by > 0; by >>= 1) {
      const int64_t a = warp_get_xor(out.least, by), b = warp_get_xor(out.most, by);
      out.least = a < out.least ? a : out.least, out.most = b > out.most ? b : out.most;
    }
  }
  if (j.mask != nullptr && tile.keys - j.mask_width < out.least) out.least = tile.keys - j.mask_width;
  return out;
}

// kDim: padded D. kColumns: 8-key blocks of S per step.
template <FloatType kType, int kDim, int kColumns>
class AttentionRows {
 public:
  using Scores = float[kColumns][4];
  using Weights = uint32_t[kColumns][2];  // as fragments of A: rows g, then g + 8

  // first_row: of the tile, the warp's first.
  UNMASK_DEVICE AttentionRows(const AttentionJob& j, const RowTile& tile, int first_row)
      : j_(j), tile_(tile), first_row_(first_row) {
#pragma unroll
    for (int h = 0; h < 2; ++h) view_[h] = row_view(j, tile, first_row + lane_id() / 4 + 8 * h);
  }

  // Fragments of Q of k16 step c, straight from global memory: 4 bytes a lane, once. Zeros beyond D and beyond the tile's rows.
  UNMASK_DEVICE void load_queries(int64_t kv_head, uint32_t (&q)[kDim / 16][4]) const {
    const int t = lane_id() % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row_ + lane_id() / 4 + 8 * h;
      const bool live = row < tile_.rows;
      const int64_t r = tile_.row_begin + (live ? row : 0);
      const uint16_t* from = static_cast<const uint16_t*>(j_.q) + (tile_.q_begin + r / j_.group) * j_.q_stride[0] +
                             (kv_head * j_.group + r % j_.group) * j_.q_stride[1];
#pragma unroll
      for (int c = 0; c < kDim / 8; ++c) {
        const int d = c * 8 + 2 * t;
        q[c / 2][h + c % 2 * 2] = live && d < j_.dim ? *reinterpret_cast<const uint32_t*>(from + d) : 0u;
      }
    }
  }

  // -inf for what a row does not see of keys [key, key + 8 kColumns), of which those from `end` on are nobody's; returns which of this
  // lane's scores are seen: bit n * 4 + i for s[n][i].
  UNMASK_DEVICE uint32_t hide(int64_t key, int64_t end, Scores& s) const {
    uint32_t seen = 0;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t at = key + n * 8 + lane_id() % 4 * 2 + i % 2;
        if (at < end && sees(j_, tile_, view_[i / 2], at)) seen |= 1u << (n * 4 + i);
        else s[n][i] = neg_inf();
      }
    }
    return seen;
  }

  // Scores become weights 2^(s - m); the maximum, the sum and O follow. A quad (4 lanes) holds a row's scores.
  UNMASK_DEVICE void update(Scores& s) {
    float top[2] = {m_[0], m_[1]};
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) top[i / 2] = max_drop_nan(top[i / 2], s[n][i]);
    }
    bool moved = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = max_drop_nan(top[h], warp_get_xor(top[h], 1));
      top[h] = max_drop_nan(top[h], warp_get_xor(top[h], 2));
      moved = moved || top[h] != m_[h];
    }
    if (warp_ballot(moved) != 0) {
      const float by[2] = {exp2_approx(m_[0] - safe_max(top[0])), exp2_approx(m_[1] - safe_max(top[1]))};
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o_[d][i] *= by[i / 2];
      }
      l_[0] *= by[0], l_[1] *= by[1];
      m_[0] = top[0], m_[1] = top[1];
    }
    const float m[2] = {safe_max(m_[0]), safe_max(m_[1])};
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = exp2_approx(s[n][i] - m[i / 2]);
        l_[i / 2] += s[n][i];
      }
    }
  }

  static UNMASK_DEVICE void pack(const Scores& s, Weights& p) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
      p[n][0] = packed_pair<kType>(s[n][0], s[n][1]), p[n][1] = packed_pair<kType>(s[n][2], s[n][3]);
  }

  // The share of O that elements of V which are not finite have, for the rows that see their key; the product counts them as zeros, for a
  // weight of 0 would not keep a NaN from the other rows. values(k, d): elements d and d + 1 (d even) of the k-th of the keys.
  template <class Values>
  UNMASK_DEVICE void add_invalid(const Scores& s, uint32_t seen, const Values& values) {
    const int t = lane_id() % 4;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      for (int k = 0; k < 8; ++k) {
        const int from = lane_id() / 4 * 4 + k / 2;  // the lane that holds this row's weight of key k
        const uint32_t all = warp_get(seen, from);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float even = warp_get(s[n][2 * h], from), odd = warp_get(s[n][2 * h + 1], from);
          if ((all >> (n * 4 + 2 * h + k % 2) & 1u) == 0) continue;
          const float p = rounded<kType>(k % 2 == 0 ? even : odd);
#pragma unroll
          for (int d = 0; d < kDim / 8; ++d) {
            const uint32_t x = values(n * 8 + k, d * 8 + 2 * t);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const auto bits = static_cast<uint16_t>(x >> (16 * i));
              if (invalid(bits)) o_[d][2 * h + i] += p * Element<kType>::value(bits);
            }
          }
        }
      }
    }
  }
  static UNMASK_DEVICE bool invalid(uint32_t bits) {  // NaN or infinity, of the low 16 bits
    constexpr uint32_t kExponent = kType == FloatType::bf16 ? 0x7F80u : 0x7C00u;
    return (bits & kExponent) == kExponent;
  }
  static UNMASK_DEVICE bool any_invalid(uint32_t pair) { return invalid(pair) || invalid(pair >> 16); }
  static UNMASK_DEVICE uint32_t without_invalid(uint32_t pair) {
    return pair & ((invalid(pair) ? 0u : 0xFFFFu) | (invalid(pair >> 16) ? 0u : 0xFFFF0000u));
  }

  // The warp's rows to their places in shared memory; where(row): of the tile. O, then maximum and sum.
  template <class Where>
  UNMASK_DEVICE void leave(const Where& where) const {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float l = l_[h];  // this lane's share so far
      l = l + warp_get_xor(l, 1);
      l = l + warp_get_xor(l, 2);
      float* row = where(first_row_ + g + 8 * h);
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d)
        store8(row + d * 8 + 2 * t, bits_of_float(o_[d][2 * h]), bits_of_float(o_[d][2 * h + 1]));
      if (t == 0) row[kDim] = m_[h], row[kDim + 1] = l;
    }
  }

 UNMASK_DEVICE float (&outputs()) [kDim / 8][4] { return o_; }

 private : const AttentionJob& j_;
  const RowTile& tile_;
  const int first_row_;
  RowView view_[2];
  float o_[kDim / 8][4] = {};
  float m_[2] = {neg_inf(), neg_inf()}, l_[2] = {0.0f, 0.0f};
};

}  // namespace unmask::cuda
