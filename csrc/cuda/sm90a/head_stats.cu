// Launches of the fused LM head: gather the rows, scan, fold. Compiled for sm_90a only.
#include "cuda/head_stats.cuh"

#include "cuda/common/device.h"
#include "cuda/common/tensor_map.h"
#include "cuda/head_stats_launch.h"

namespace unmask::cuda {
namespace {

template <FloatType kType, int kTokens>
void launch_scan(const HeadJob& job, const HeadPlan& plan, const Launch& launch) {
  const auto kernel =
      job.stats.in.temperature > 0.0f ? head_scan<kType, kTokens, true> : head_scan<kType, kTokens, false>;
  launch.check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes)));
  launch_clusters(launch, kernel, plan.blocks, (kHeadWarps + 1) * 32, plan.shared_bytes, 1, job);
}

template <FloatType kType>
void launch_typed(const HeadJob& job, const HeadPlan& plan, const Launch& launch) {
  switch (plan.tokens) {
    case 32: return launch_scan<kType, 32>(job, plan, launch);
    case 64: return launch_scan<kType, 64>(job, plan, launch);
  }
  launch.refuse("no kernel for " + std::to_string(plan.tokens) + " tokens");
}

}  // namespace

void launch_head_stats(const HeadCall& call, const HeadPlan& plan, const StatsOutputs& out, const Launch& launch) {
  const bool bf16 = call.stats.in.type == FloatType::bf16;
  const int64_t entries = call.stats.entries;
  if (call.gathered != nullptr) {
    gather_rows<<<static_cast<unsigned>(entries), 128, 0, launch.stream>>>(
        GatherJob{static_cast<const char*>(call.hidden), static_cast<char*>(call.gathered), call.stats.rows,
                  call.stats.rows_stride, call.stats.n_rows, call.width * 2, call.hidden_stride * 2});
    launch.check();
  }
  const int64_t w_size[2] = {call.width, call.stats.in.vocab}, x_size[2] = {call.width, entries};
  const int64_t x_stride = call.gathered != nullptr ? call.width : call.hidden_stride;
  HeadJob job{make_tensor_map(launch, "weight", call.weight, bf16, 2, w_size, &call.weight_stride),
              make_tensor_map(launch, "hidden", call.gathered != nullptr ? call.gathered : call.hidden, bf16, 2, x_size,
                              &x_stride, plan.tokens),
              call.stats,
              call.id_logit,
              call.width,
              plan.units,
              static_cast<int>(plan.stages)};
  if (bf16) launch_typed<FloatType::bf16>(job, plan, launch);
  else launch_typed<FloatType::f16>(job, plan, launch);
  head_fold<<<static_cast<unsigned>((entries + kWarpsPerBlock - 1) / kWarpsPerBlock), kWarpsPerBlock * 32, 0,
              launch.stream>>>(call.stats, out);
  launch.check();
}

}  // namespace unmask::cuda
