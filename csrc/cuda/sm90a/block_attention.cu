// Launches of the Hopper kernel of block_attention; compiled for sm_90a only.
#include "cuda/block_attention_launch.cuh"
#include "cuda/block_attention_wgmma.cuh"
#include "cuda/common/tensor_map.h"

namespace unmask::cuda {
namespace {

template <FloatType kType>
void launch_typed(const WgmmaJob& job, const AttentionPlan& plan, const Launch& launch) {
  switch (plan.dim) {
    case 64: return launch_attention_kernel(attention_wgmma<kType, 64>, job, plan, launch);
    case 128: return launch_attention_kernel(attention_wgmma<kType, 128>, job, plan, launch);
  }
  fail_must_be("block_attention", "padded D", "64 or 128", std::to_string(plan.dim));
}

CUtensorMap map_of(const char* name, const void* data, bool bf16, const AttentionJob& j, const int64_t* stride,
                   const Launch& launch) {
  const int64_t size[4] = {j.dim, j.slots, j.kv_heads, j.rows}, steps[3] = {stride[2], stride[1], stride[0]};
  return make_tensor_map(launch, name, data, bf16, 4, size, steps);
}

}  // namespace

void launch_attention_wgmma(const AttentionJob& job, bool bf16, const AttentionPlan& plan, const Launch& launch) {
  const WgmmaJob w{map_of("k_cache", job.k, bf16, job, job.k_stride, launch),
                   map_of("v_cache", job.v, bf16, job, job.v_stride, launch), job};
  if (bf16) launch_typed<FloatType::bf16>(w, plan, launch);
  else launch_typed<FloatType::f16>(w, plan, launch);
}

}  // namespace unmask::cuda
