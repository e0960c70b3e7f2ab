// Launches of the tile kernels of block_attention: one translation unit per element type includes this and defines its function.
#pragma once
#include "cuda/block_attention_mma.cuh"
#include "cuda/common/device.h"

namespace unmask::cuda {

void launch_attention_bf16(const AttentionJob& job, const AttentionPlan& plan, const Launch& launch);
void launch_attention_f16(const AttentionJob& job, const AttentionPlan& plan, const Launch& launch);
void launch_attention_wgmma(const AttentionJob& job, bool bf16, const AttentionPlan& plan, const Launch& launch);

// Splits of a tile are a cluster where the plan says so.
template <class Kernel, class Job>
void launch_attention_kernel(Kernel kernel, const Job& job, const AttentionPlan& plan, const Launch& launch) {
  // above 48 KB a kernel must be told; the setting belongs to the current device, so it is made at every launch
  launch.check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes)));
  launch.check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  launch_clusters(launch, kernel, plan.blocks, kAttentionWarps * 32, plan.shared_bytes, plan.cluster ? plan.splits : 1,
                  job);
}

template <FloatType kType, int kDim, int kRowWarps>
void launch_attention_tiles(const AttentionJob& job, const AttentionPlan& plan, const Launch& launch) {
  launch_attention_kernel(attention_tiles<kType, kDim, kRowWarps>, job, plan, launch);
}

template <FloatType kType, int kDim>
void launch_attention_rows(const AttentionJob& job, const AttentionPlan& plan, const Launch& launch) {
  switch (plan.row_warps) {
    case 1: return launch_attention_tiles<kType, kDim, 1>(job, plan, launch);
    case 2: return launch_attention_tiles<kType, kDim, 2>(job, plan, launch);
    case 4: return launch_attention_tiles<kType, kDim, 4>(job, plan, launch);
  }
  fail_must_be("block_attention", "row_warps", "1, 2 or 4", std::to_string(plan.row_warps));
}

template <FloatType kType>
void launch_attention(const AttentionJob& job, const AttentionPlan& plan, const Launch& launch) {
  switch (plan.dim) {
    case 64: return launch_attention_rows<kType, 64>(job, plan, launch);
    case 128: return launch_attention_rows<kType, 128>(job, plan, launch);
  }
  fail_must_be("block_attention", "padded D", "64 or 128", std::to_string(plan.dim));
}

}  // namespace unmask::cuda
