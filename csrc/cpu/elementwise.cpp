// rms_norm(x[T, D], weight[D], eps) -> [T, D];  add_rms_norm(residual[T, D] in place, x, weight, eps) -> [T, D];
// silu_mul(gate_up[T, 2F]) -> [T, F].  Rows are split over threads; rows whose elements are not dense are made so first.
#include "common/dense.h"
#include "common/elementwise_args.h"
#include "common/register.h"
#include "cpu/alloc.h"
#include "cpu/elementwise_kernels.h"
#include "cpu/layer_parts.h"
#include "cpu/parallel.h"

namespace unmask::cpu {
namespace {

// Elements per thread that are worth waking it: ~10 us of work.
constexpr int64_t kNormGrain = 65536, kSiluGrain = 32768;

int64_t grain_rows(int64_t grain, int64_t width) { return width > 0 ? (grain + width - 1) / width : grain; }

Tensor norm(const Tensor& x, Tensor* residual, const Tensor& weight, double eps) {
  Tensor out = empty_as<2>({x.size(0), x.size(1)}, x);
  norm_into(dense(x), residual, dense(weight), eps, x.size(0), out);
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
  Tensor out = empty_as<2>({gate_up.size(0), gate_up.size(1) / 2}, gate_up);
  silu_mul_into(dense(gate_up), gate_up.size(0), out);
  return out;
}

}  // namespace

void norm_into(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps, int64_t rows, Tensor& out) {
  const int64_t dim = x.size(1);
  if (rows == 0 || dim == 0) return;
  const NormParams p = norm_params(x, residual, weight, out, dtype_code(x), eps);
  const auto kernel = UNMASK_KERNEL(rms_norm_rows);
  parallel_for(rows, grain_rows(kNormGrain, dim), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void silu_mul_into(const Tensor& gate_up, int64_t rows, Tensor& out) {
  const int64_t width = gate_up.size(1) / 2;
  if (rows == 0 || width == 0) return;
  const SiluParams p{gate_up.const_data_ptr(), out.mutable_data_ptr(), gate_up.stride(0), width, dtype_code(gate_up)};
  const auto kernel = UNMASK_KERNEL(silu_mul_rows);
  parallel_for(rows, grain_rows(kSiluGrain, width), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void add_rows(Tensor& y, const Tensor& x, int64_t rows) {
  const int64_t width = y.size(1);
  if (rows == 0 || width == 0) return;
  const AddParams p{y.mutable_data_ptr(), x.const_data_ptr(), y.stride(0), x.dim() == 1 ? 0 : x.stride(0), width,
                    dtype_code(y)};
  const auto kernel = UNMASK_KERNEL(add_rows);
  parallel_for(rows, grain_rows(kNormGrain, width), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace unmask::cpu

UNMASK_IMPL(CPU, rms_norm, &unmask::cpu::rms_norm)
UNMASK_IMPL(CPU, add_rms_norm, &unmask::cpu::add_rms_norm)
UNMASK_IMPL(CPU, silu_mul, &unmask::cpu::silu_mul)
