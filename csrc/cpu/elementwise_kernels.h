// Parameters and entry points of the row-wise kernels (kernels/elementwise.cpp). Elements of a row are dense; strides are in elements.
#pragma once
#include <stdint.h>

#include "cpu/isa.h"

namespace unmask::cpu {

struct NormParams {
  const void* x;  // [T, D], row stride x_row
  void* residual;  // [T, D], row stride residual_row, or null: then x itself is normalised
  const void* weight;  // [D]
  void* out;  // [T, D] dense
  int64_t x_row, residual_row, dim;
  int64_t dtype;  // 0 fp32, 1 bf16, 2 fp16
  float eps;
};

struct SiluParams {
  const void* gate_up;  // [T, 2F], row stride row
  void* out;  // [T, F] dense
  int64_t row, width;  // width = F
  int64_t dtype;
};

}  // namespace unmask::cpu

UNMASK_DECLARE_KERNEL(void, rms_norm_rows, const NormParams& p, int64_t begin, int64_t end)
UNMASK_DECLARE_KERNEL(void, silu_mul_rows, const SiluParams& p, int64_t begin, int64_t end)
