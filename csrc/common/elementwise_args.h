// Argument checks of rms_norm, add_rms_norm and silu_mul, the same on every backend.
#pragma once
#include <cmath>

#include "common/check.h"
#include "common/elementwise_params.h"

namespace unmask {

inline void check_rms_norm(const char* op, const Tensor* residual, const Tensor& x, const Tensor& weight, double eps) {
  const Checker check(op, residual ? *residual : x);
  if (residual) check.floating(*residual, "residual");
  else check.floating(x, "x");
  const ScalarType dtype = residual ? residual->scalar_type() : x.scalar_type();
  check.dtype(x, "x", dtype);
  check.dtype(weight, "weight", dtype);
  if (residual) check.shape(*residual, "residual", "[T, D]", {-1, -1});
  if (residual) check.shape(x, "x", "[T, D]", {residual->size(0), residual->size(1)});
  else check.shape(x, "x", "[T, D]", {-1, -1});
  check.shape(weight, "weight", "[D]", {x.size(1)});
  if (residual) check.writable(*residual, "residual");
  check.require(std::isfinite(eps) && eps >= 0.0, "eps", "finite and >= 0", eps);
}

// x and weight with dense rows; dtype: as NormParams counts, for kernels that ask.
inline NormParams norm_params(const Tensor& x, const Tensor* residual, const Tensor& weight, const Tensor& out,
                              int64_t dtype, double eps) {
  return {x.const_data_ptr(),
          residual ? residual->mutable_data_ptr() : nullptr,
          weight.const_data_ptr(),
          out.mutable_data_ptr(),
          x.stride(0),
          residual ? residual->stride(0) : 0,
          x.size(1),
          dtype,
          static_cast<float>(eps)};
}

inline void check_silu_mul(const Tensor& gate_up) {
  const Checker check("silu_mul", gate_up);
  check.floating(gate_up, "gate_up");
  check.shape(gate_up, "gate_up", "[T, 2F]", {-1, -1});
  check.require(gate_up.size(1) % 2 == 0, "gate_up's last dimension", "even", gate_up.size(1));
}

}  // namespace unmask
