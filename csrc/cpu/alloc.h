// A new dense CPU tensor through the C shim: a tenth of the cost of the boxed aten::new_empty, which counts in a call of microseconds.
#pragma once
#include <array>
#include <cstdint>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"

namespace unmask::cpu {

// `code`: the shim's number of the dtype.
template <size_t N>
inline Tensor empty_of_code(const std::array<int64_t, N>& sizes, int32_t code) {
  std::array<int64_t, N> strides{};
  int64_t stride = 1;
  for (size_t i = N; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  static const int32_t cpu = aoti_torch_device_type_cpu();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(N, sizes.data(), strides.data(), code, cpu, 0, &handle));
  return Tensor(handle);
}
template <size_t N>
inline Tensor empty(const std::array<int64_t, N>& sizes, ScalarType dtype) {
  return empty_of_code<N>(sizes, shim_codes().of(dtype));
}
template <size_t N>
inline Tensor empty_as(const std::array<int64_t, N>& sizes, const Tensor& like) {
  return empty_of_code<N>(sizes, shim_dtype(like));
}

// Another shape of t's memory, from element `offset` of its storage on; t begins at 0 of it.
template <size_t N>
inline Tensor view(const Tensor& t, const std::array<int64_t, N>& sizes, const std::array<int64_t, N>& strides,
                   int64_t offset = 0) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), N, sizes.data(), strides.data(), offset, &handle));
  return Tensor(handle);
}

// How kernels name the three floating dtypes.
inline int64_t dtype_code(const Tensor& t) {
  const int32_t code = shim_dtype(t);
  return code == shim_codes().float32 ? 0 : code == shim_codes().bfloat16 ? 1 : 2;
}
// Bytes of an element of one of the three.
inline int64_t element_bytes(const Tensor& t) { return dtype_code(t) == 0 ? 4 : 2; }

}  // namespace unmask::cpu
