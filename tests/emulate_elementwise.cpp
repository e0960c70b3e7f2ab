// The CUDA kernels of rms_norm, add_rms_norm and silu_mul on the CPU (emulate_warp.h), behind C functions that
// tests/test_cuda_emulated_rows.py calls by ctypes. type: 0 fp32, 1 bf16, 2 fp16.
#include "emulate_warp.h"

#include "cuda/elementwise.cuh"

using namespace unmask;
using namespace unmask::cuda;

namespace {

template <FloatType kType>
void norm(const NormParams& p, int64_t rows, bool aligned) {
  emulate((rows + kRowWarps - 1) / kRowWarps, kRowWarps, [&] { norm_rows<kType>(p, rows, aligned); });
}
template <FloatType kType>
void silu(const SiluParams& p, int64_t rows, bool aligned) {
  const int64_t warps = rows * ((p.width + kWarpRun - 1) / kWarpRun);
  emulate((warps + kRowWarps - 1) / kRowWarps, kRowWarps, [&] { silu_rows<kType>(p, rows, aligned); });
}

}  // namespace

extern "C" {

int emulated_norm(const void* x, void* residual, const void* weight, void* out, int64_t x_row, int64_t residual_row,
                  int64_t dim, int64_t type, float eps, int64_t rows, bool aligned) {
  const NormParams p{x, residual, weight, out, x_row, residual_row, dim, type, eps};
  return guarded([&] {
    if (type == 0) norm<FloatType::f32>(p, rows, aligned);
    else if (type == 1) norm<FloatType::bf16>(p, rows, aligned);
    else norm<FloatType::f16>(p, rows, aligned);
  });
}

int emulated_silu(const void* gate_up, void* out, int64_t row, int64_t width, int64_t type, int64_t rows,
                  bool aligned) {
  const SiluParams p{gate_up, out, row, width, type};
  return guarded([&] {
    if (type == 0) silu<FloatType::f32>(p, rows, aligned);
    else if (type == 1) silu<FloatType::bf16>(p, rows, aligned);
    else silu<FloatType::f16>(p, rows, aligned);
  });
}
}
