// uniform on CUDA: one thread per entry, the same Philox words and the same float as the CPU (csrc/common/philox.h), so
// equal bits.
#include <torch/csrc/stable/ops.h>

#include "common/philox.h"
#include "common/register.h"
#include "common/uniform_args.h"
#include "cuda/common/stream.h"

namespace unmask::cuda {
namespace {

constexpr int kThreads = 256;

struct UniformParams {
  const int64_t* seed;
  const int64_t* step;
  const int64_t* pos;
  int64_t seed_stride, step_stride, pos_stride;
  float* out;
  int64_t n;
};

__global__ void __launch_bounds__(kThreads) uniform_kernel(const UniformParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.n) return;
  const Philox4 words =
      philox(static_cast<uint64_t>(p.seed[i * p.seed_stride]), 0u, static_cast<uint32_t>(p.pos[i * p.pos_stride]),
             static_cast<uint32_t>(p.step[i * p.step_stride]), 1u);
  p.out[i] = uniform_from_bits(words.x);
}

Tensor uniform(const Tensor& seed, const Tensor& step, const Tensor& pos) {
  const int64_t n = check_uniform(seed, step, pos);
  const Launch launch("uniform", seed);
  Tensor out = torch::stable::new_empty(seed, {n}, std::make_optional(ScalarType::Float));
  if (n == 0) return out;
  const UniformParams p{static_cast<const int64_t*>(seed.const_data_ptr()),
                        static_cast<const int64_t*>(step.const_data_ptr()),
                        static_cast<const int64_t*>(pos.const_data_ptr()),
                        seed.stride(0),
                        step.stride(0),
                        pos.stride(0),
                        static_cast<float*>(out.mutable_data_ptr()),
                        n};
  uniform_kernel<<<static_cast<unsigned>((n + kThreads - 1) / kThreads), kThreads, 0, launch.stream>>>(p);
  launch.check();
  return out;
}

}  // namespace
}  // namespace unmask::cuda

UNMASK_IMPL(CUDA, uniform, &unmask::cuda::uniform)
