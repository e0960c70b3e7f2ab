// rms_norm, add_rms_norm and silu_mul on CUDA; tests run this code on emulated warps (tests/emulate_warp.h).
//   residual += x (rounded);  y = round(x / sqrt(mean x^2 + eps)) * weight;      y = round(g / (1 + e^-g)) * u
//
// Layout: rows of dense elements. Bytes: the norm reads x once from memory and once from L1/L2 (a row of 4,096 bf16 is 8 KB) and writes
// as much; with a residual four streams instead of two; silu_mul reads 2F and writes F. FLOPs: 4 and 25 an element: memory-bound.
// Work split: a warp per row for the norms, whose sum then has one order for any batch; a warp per 256 elements for silu_mul. Each lane
// takes 8 neighbours, 16 bytes of bf16, where rows are 16-byte aligned; else one element after the other, in the same lanes and order.
#pragma once
#include "common/elementwise_params.h"
#include "cuda/common/elements.cuh"

namespace unmask::cuda {

constexpr int kRowWarps = 4;  // warps per block
constexpr int kWarpRun = 32 * kRun;  // elements that a warp takes at once

// 16-byte loads are possible: every row starts at a multiple of 16 bytes.
inline bool rows_are_aligned(const void* p, int64_t row_stride, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && row_stride * element_bytes % 16 == 0;
}

template <FloatType kType>
struct RowPart {  // elements [i, i + kRun) of a row of n
  using Bits = typename Element<kType>::Bits;

  static UNMASK_DEVICE void load(const Bits* row, int64_t i, int64_t n, bool aligned, float* x) {
    if (aligned && i + kRun <= n) {
      Run<kType> run;
      run.load(row + i);
#pragma unroll
      for (int k = 0; k < kRun; ++k) x[k] = run.get(k);
      return;
    }
#pragma unroll
    for (int k = 0; k < kRun; ++k) x[k] = i + k < n ? Element<kType>::value(row[i + k]) : 0.0f;
  }
  static UNMASK_DEVICE void store(Bits* row, int64_t i, int64_t n, bool aligned, const float* x) {
    if (aligned && i + kRun <= n) {
      Run<kType> run;
#pragma unroll
      for (int k = 0; k < kRun; ++k) run.set(k, x[k]);
      run.store(row + i);
      return;
    }
#pragma unroll
    for (int k = 0; k < kRun; ++k)
      if (i + k < n) row[i + k] = Element<kType>::bits(x[k]);
  }
};

template <FloatType kType>
UNMASK_KERNEL_BOUNDS(kRowWarps * 32, 8)
norm_rows(const NormParams p, const int64_t rows, const bool aligned) {
  using Bits = typename Element<kType>::Bits;
  using Part = RowPart<kType>;
  const int64_t t = block_index() * kRowWarps + warp_in_block(), n = p.dim;
  if (t >= rows) return;
  const Bits* x = static_cast<const Bits*>(p.x) + t * p.x_row;
  Bits* const residual = p.residual != nullptr ? static_cast<Bits*>(p.residual) + t * p.residual_row : nullptr;
  float a[kRun], b[kRun], sum = 0.0f;
  for (int64_t i = lane_id() * kRun; i < n; i += kWarpRun) {
    Part::load(x, i, n, aligned, a);
    if (residual != nullptr) {
      Part::load(residual, i, n, aligned, b);
#pragma unroll
      for (int k = 0; k < kRun; ++k) a[k] = rounded<kType>(b[k] + a[k]);
      Part::store(residual, i, n, aligned, a);
    }
#pragma unroll
    for (int k = 0; k < kRun; ++k) sum = UNMASK_FMA(a[k], a[k], sum);
  }
  const float scale = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(n) + p.eps);
  if (residual != nullptr) x = residual;  // this lane reads back what it wrote
  for (int64_t i = lane_id() * kRun; i < n; i += kWarpRun) {
    Part::load(x, i, n, aligned, a);
    Part::load(static_cast<const Bits*>(p.weight), i, n, aligned, b);
#pragma unroll
    for (int k = 0; k < kRun; ++k) a[k] = rounded<kType>(a[k] * scale) * b[k];
    Part::store(static_cast<Bits*>(p.out) + t * n, i, n, aligned, a);
  }
}

// x sigmoid(x) from e = e^-|x| <= 1, which cannot overflow.
UNMASK_DEVICE float silu(float x) {
  const float e = exp_neg(x > 0.0f ? -x : x);
  return (x < 0.0f ? x * e : x) / (1.0f + e);
}

template <FloatType kType>
UNMASK_KERNEL_BOUNDS(kRowWarps * 32, 8)
silu_rows(const SiluParams p, const int64_t rows, const bool aligned) {
  using Bits = typename Element<kType>::Bits;
  using Part = RowPart<kType>;
  const int64_t n = p.width, parts = (n + kWarpRun - 1) / kWarpRun;
  const int64_t unit = block_index() * kRowWarps + warp_in_block();
  const int64_t t = unit / parts, i = unit % parts * kWarpRun + lane_id() * kRun;
  if (t >= rows || i >= n) return;
  const Bits* gate = static_cast<const Bits*>(p.gate_up) + t * p.row;
  float g[kRun], u[kRun];
  Part::load(gate, i, n, aligned, g);
  Part::load(gate + n, i, n, aligned, u);
#pragma unroll
  for (int k = 0; k < kRun; ++k) g[k] = rounded<kType>(silu(g[k])) * u[k];
  Part::store(static_cast<Bits*>(p.out) + t * n, i, n, aligned, g);
}

}  // namespace unmask::cuda
