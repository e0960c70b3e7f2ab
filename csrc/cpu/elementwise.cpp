// rms_norm(x[T, D], weight[D], eps) -> [T, D];  add_rms_norm(residual[T, D] in place, x, weight, eps) -> [T, D];
// silu_mul(gate_up[T, 2F]) -> [T, F].  Rows are split over threads; rows whose elements are not dense are made so first.
#include "common/dense.h"
#include "common/elementwise_args.h"
#include "common/register.h"
#include "cpu/alloc.h"
#include "cpu/elementwise_kernels.h"
#include "cpu/parallel.h"

namespace unmask::cpu {
namespace {

// Elements per thread that are worth waking it: ~10 us of work.
constexpr int64_t kNormGrain = 65536, kSiluGrain = 32768;

int64_t grain_rows(int64_t grain, int64_t width) { return width > 0 ? (grain + width - 1) / width : grain; }

Tensor norm(const Tensor& x, Tensor* residual, const Tensor& weight, double eps) {
  const int64_t rows = x.size(0), dim = x.size(1);
  Tensor out = empty_as<2>({rows, dim}, x);
  if (rows == 0 || dim == 0) return out;
  const Tensor xd = dense(x), wd = dense(weight);
  const NormParams p = norm_params(xd, residual, wd, out, dtype_code(x), eps);
  const auto kernel = UNMASK_KERNEL(rms_norm_rows);
  parallel_for(rows, grain_rows(kNormGrain, dim), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  check_rms_norm("rms_norm", nullptr, x, weight, eps);
  return norm(x, nullptr, weight, eps);
}

Tensor add_rms_norm(Tensor residual, const Tensor& x, const Tensor& weight, double eps) {
  check_rms_norm("add_rms_norm", &residual, x, weight, eps);
  if (dense_rows(residual)) return norm(x, &residual, weight, eps);
  Tensor copy = torch::stable::contiguous(residual);
  Tensor out = norm(x, &copy, weight, eps);
  torch::stable::copy_(residual, copy);
  return out;
}

Tensor silu_mul(const Tensor& gate_up) {
  check_silu_mul(gate_up);
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  Tensor out = empty_as<2>({rows, width}, gate_up);
  if (rows == 0 || width == 0) return out;
  const Tensor in = dense(gate_up);
  const SiluParams p{in.const_data_ptr(), out.mutable_data_ptr(), in.stride(0), width, dtype_code(in)};
  const auto kernel = UNMASK_KERNEL(silu_mul_rows);
  parallel_for(rows, grain_rows(kSiluGrain, width), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return out;
}

}  // namespace
}  // namespace unmask::cpu

UNMASK_IMPL(CPU, rms_norm, &unmask::cpu::rms_norm)
UNMASK_IMPL(CPU, add_rms_norm, &unmask::cpu::add_rms_norm)
UNMASK_IMPL(CPU, silu_mul, &unmask::cpu::silu_mul)
