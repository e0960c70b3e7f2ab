// From a tensor's dtype to a template argument. A dtype that no kernel takes ends in a throw.
#pragma once
#include <string>
#include <type_traits>

#include "common/check.h"
#include "common/float_type.h"

namespace unmask::cuda {

// Calls f(std::integral_constant<FloatType, ...>) for the dtype of `t`.
template <class F>
void with_float_type(const char* op, const Tensor& t, const F& f) {
  const int32_t code = shim_dtype(t);
  if (code == shim_codes().float32) return f(std::integral_constant<FloatType, FloatType::f32>{});
  if (code == shim_codes().bfloat16) return f(std::integral_constant<FloatType, FloatType::bf16>{});
  if (code == shim_codes().float16) return f(std::integral_constant<FloatType, FloatType::f16>{});
  fail_must_be(op, "the tensors", "float32, bfloat16 or float16", dtype_name(t.scalar_type()));
}

}  // namespace unmask::cuda
