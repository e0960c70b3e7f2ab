// rms_norm, add_rms_norm and silu_mul on CUDA: checks (the CPU's own), outputs, one launch each. Device code: elementwise.cuh.
#include "common/dense.h"
#include "common/elementwise_args.h"
#include "common/register.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/stream.h"
#include "cuda/elementwise.cuh"

namespace unmask::cuda {
namespace {

unsigned blocks_for(const char* op, int64_t warps) {
  const int64_t blocks = (warps + kRowWarps - 1) / kRowWarps;
  if (blocks > INT32_MAX) fail(op, "too many rows for one launch: " + std::to_string(warps) + " warps of work");
  return static_cast<unsigned>(blocks);
}

Tensor norm(const char* op, const Tensor& x, Tensor* residual, const Tensor& weight, double eps) {
  const int64_t rows = x.size(0), dim = x.size(1);
  Tensor out = torch::stable::new_empty(x, {rows, dim});
  if (rows == 0 || dim == 0) return out;
  const Tensor xd = dense(x), wd = dense(weight);
  const NormParams p = norm_params(xd, residual, wd, out, 0, eps);
  const Launch launch(op, x);
  with_float_type(op, x, [&](auto type) {
    constexpr FloatType kType = decltype(type)::value;
    const int64_t size = sizeof(typename Element<kType>::Bits);
    const bool aligned = rows_are_aligned(p.x, p.x_row, size) && rows_are_aligned(p.weight, 0, size) &&
                         rows_are_aligned(p.out, dim, size) && rows_are_aligned(p.residual, p.residual_row, size);
    norm_rows<kType><<<blocks_for(op, rows), kRowWarps * 32, 0, launch.stream>>>(p, rows, aligned);
  });
  launch.check();
  return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  check_rms_norm("rms_norm", nullptr, x, weight, eps);
  return norm("rms_norm", x, nullptr, weight, eps);
}

Tensor add_rms_norm(Tensor residual, const Tensor& x, const Tensor& weight, double eps) {
  check_rms_norm("add_rms_norm", &residual, x, weight, eps);
  if (dense_rows(residual)) return norm("add_rms_norm", x, &residual, weight, eps);
  Tensor copy = torch::stable::contiguous(residual);
  Tensor out = norm("add_rms_norm", x, &copy, weight, eps);
  torch::stable::copy_(residual, copy);
  return out;
}

Tensor silu_mul(const Tensor& gate_up) {
  check_silu_mul(gate_up);
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  Tensor out = torch::stable::new_empty(gate_up, {rows, width});
  if (rows == 0 || width == 0) return out;
  const Tensor in = dense(gate_up);
  const SiluParams p{in.const_data_ptr(), out.mutable_data_ptr(), in.stride(0), width, 0};
  const Launch launch("silu_mul", gate_up);
  with_float_type("silu_mul", gate_up, [&](auto type) {
    constexpr FloatType kType = decltype(type)::value;
    const int64_t size = sizeof(typename Element<kType>::Bits), parts = (width + kWarpRun - 1) / kWarpRun;
    const bool aligned =
        rows_are_aligned(p.gate_up, p.row, size) && width * size % 16 == 0 && rows_are_aligned(p.out, width, size);
    silu_rows<kType><<<blocks_for("silu_mul", rows * parts), kRowWarps * 32, 0, launch.stream>>>(p, rows, aligned);
  });
  launch.check();
  return out;
}

}  // namespace
}  // namespace unmask::cuda

UNMASK_IMPL(CUDA, rms_norm, &unmask::cuda::rms_norm)
UNMASK_IMPL(CUDA, add_rms_norm, &unmask::cuda::add_rms_norm)
UNMASK_IMPL(CUDA, silu_mul, &unmask::cuda::silu_mul)
