// Between the op (head_stats.cu) and the kernels of sm_90a: plain data.
#pragma once
#include "cuda/common/stream.h"
#include "cuda/head_stats_plan.h"
#include "cuda/logit_stats.cuh"

namespace unmask::cuda {

struct HeadCall {
  StatsJob stats;
  const void *hidden, *weight;
  void* gathered;  // [T', d]: the rows asked for; null: rows 0 .. T' - 1 of hidden
  float* id_logit;  // [T', n_ids]
  int64_t width, hidden_stride, weight_stride;  // elements
};

void launch_head_stats(const HeadCall& call, const HeadPlan& plan, const StatsOutputs& out, const Launch& launch);

}  // namespace unmask::cuda
