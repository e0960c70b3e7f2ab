// KL divergence between the softmaxes of two rows of logits, given their logsumexps: plain data, one header for the CPU and CUDA.
//
//   KL = sum over v of  p (max(ln p, L) - max(ln q, L)),   ln p = x - lse,   ln q = y - lse',   L = ln 1e-12
//
// An id with x = -inf has p = 0 and adds 0. A NaN, or a +inf (whose logsumexp is +inf and has lost how many share the mass), makes the sum NaN.
// Work is cut into chunks of kStatsChunk ids; their fp32 sums are added in fp64, left to right.
#pragma once
#include <cstdint>

#include "common/float_type.h"
#include "common/online.h"

namespace unmask {

constexpr float kLogFloor = -0x1.ba18aap+4f;  // ln 1e-12, rounded

struct KlInputs {
  const void *logits, *previous;
  FloatType type;
  int64_t stride[2], previous_stride[2];  // row, column; elements
  int64_t vocab, n_rows, n_previous;
  const int64_t *rows, *previous_rows;  // nullptr: entry e reads row e
  int64_t rows_stride, previous_rows_stride;
  const float *lse, *previous_lse;
  int64_t lse_stride, previous_lse_stride;

  UNMASK_HD int64_t row(int64_t e) const { return rows != nullptr ? rows[e * rows_stride] : e; }
  UNMASK_HD int64_t previous_row(int64_t e) const {
    return previous_rows != nullptr ? previous_rows[e * previous_rows_stride] : e;
  }
  UNMASK_HD bool exists(int64_t e) const {
    return row(e) >= 0 && row(e) < n_rows && previous_row(e) >= 0 && previous_row(e) < n_previous;
  }
  // What an entry without two rows reports.
  UNMASK_HD float without(int64_t e) const {
    if (row(e) == -1) return 0.0f;
    if (row(e) < 0 || row(e) >= n_rows) return quiet_nan();
    return previous_row(e) == -1 ? pos_inf() : quiet_nan();
  }
};

}  // namespace unmask
