// Tensors whose last dimension is dense, as kernels that walk rows want them.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace unmask {

inline bool dense_rows(const torch::stable::Tensor& t) {
  return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1;
}
inline torch::stable::Tensor dense(const torch::stable::Tensor& t) {
  return dense_rows(t) ? t : torch::stable::contiguous(t);
}

}  // namespace unmask
