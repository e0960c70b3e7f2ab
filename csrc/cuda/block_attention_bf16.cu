#include "cuda/block_attention_launch.cuh"

void unmask::cuda::launch_attention_bf16(const AttentionJob& job, const AttentionPlan& plan, const Launch& launch) {
  launch_attention<FloatType::bf16>(job, plan, launch);
}
