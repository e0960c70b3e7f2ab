// One-dimensional tensors of any stride, readable and writable on every backend.
#pragma once
#include <cstdint>

#include "common/philox.h"  // UNMASK_HD

namespace unmask {

template <class T>
struct Strided {
  T* data = nullptr;
  int64_t stride = 0;
  UNMASK_HD T& operator[](int64_t i) const { return data[i * stride]; }
  UNMASK_HD explicit operator bool() const { return data != nullptr; }
};

// float32 or float64, read as double
struct Reals {
  const void* data = nullptr;
  int64_t stride = 0;
  bool wide = false;
  UNMASK_HD double operator[](int64_t i) const {
    return wide ? static_cast<const double*>(data)[i * stride]
                : static_cast<double>(static_cast<const float*>(data)[i * stride]);
  }
};

}  // namespace unmask
