// Arguments of the row-wise ops as plain pointers, the same on every backend. Elements of a row are dense; strides are in elements.
#pragma once
#include <cstdint>

namespace unmask {

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

struct AddParams {
  void* y;  // [T, N], row stride y_row; x is added in place
  const void* x;  // [T, N], row stride x_row; 0: one row for all
  int64_t y_row, x_row, width;
  int64_t dtype;
};

}  // namespace unmask
