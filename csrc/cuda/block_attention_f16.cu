#include "cuda/block_attention_launch.cuh"

void unmask::cuda::launch_attention_f16(const AttentionJob& job, const AttentionPlan& plan, const Launch& launch) {
  launch_attention<FloatType::f16>(job, plan, launch);
}
