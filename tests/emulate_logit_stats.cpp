// The CUDA kernels of logit_stats on the CPU (emulate_warp.h), behind C functions that tests/test_cuda_logit_stats.py
// calls by ctypes.
#include "emulate_warp.h"

#include <vector>

#include "cuda/logit_stats_kernels.cuh"
#include "cuda/logit_stats_plan.h"

using namespace unmask;
using namespace unmask::cuda;

namespace {

int64_t blocks_for(int64_t warps) { return (warps + kWarpsPerBlock - 1) / kWarpsPerBlock; }

template <FloatType kType, bool kGuided>
void scan_as(const StatsJob& job) {
  const int64_t blocks = blocks_for(job.entries * job.groups);
  if (job.in.temperature > 0.0f) emulate(blocks, kWarpsPerBlock, [&] { stats_scan<kType, true, kGuided>(job); });
  else emulate(blocks, kWarpsPerBlock, [&] { stats_scan<kType, false, kGuided>(job); });
}

template <FloatType kType>
void scan(const StatsJob& job) {
  if (job.in.null_logits != nullptr) scan_as<kType, true>(job);
  else scan_as<kType, false>(job);
}

// As run() of csrc/cuda/logit_stats.cu, with the choices of the plan open to the test (0 = the plan's own).
template <class Fold>
void run(StatsJob job, int64_t entries, int64_t group_chunks, int64_t entries_per_launch, const Fold& fold) {
  StatsPlan plan = plan_stats(entries, job.in.count);
  if (group_chunks > 0) plan.group_chunks = group_chunks;
  plan.groups = (plan.chunks + plan.group_chunks - 1) / plan.group_chunks;
  if (entries_per_launch > 0) plan.entries_per_launch = entries_per_launch;
  job.chunks = plan.chunks;
  job.group_chunks = plan.group_chunks;
  job.groups = plan.groups;
  std::vector<uint32_t> sums(static_cast<size_t>(plan.entries_per_launch * plan.chunks * kSumWords),
                             0x7FC0DEADu);  // poison: NaN
  std::vector<uint32_t> best(static_cast<size_t>(plan.entries_per_launch * plan.groups * kGroupWords), 0x7FC0DEADu);
  job.sums = reinterpret_cast<SumExp*>(sums.data());
  job.best = reinterpret_cast<GroupBest*>(best.data());
  job.dense = can_load_dense(job.in);
  for (int64_t begin = 0; begin < entries; begin += plan.entries_per_launch) {
    job.entry_begin = begin;
    job.entries = std::min(entries - begin, plan.entries_per_launch);
    switch (job.in.type) {
      case FloatType::f32: scan<FloatType::f32>(job); break;
      case FloatType::bf16: scan<FloatType::bf16>(job); break;
      case FloatType::f16: scan<FloatType::f16>(job); break;
    }
    fold(job);
  }
}

template <FloatType kType, bool kGuided>
void cluster_as(const StatsJob& job, const StatsOutputs& out, const StatsClusterPlan& p) {
  const auto run = [&](const auto& kernel) {
    emulate(job.entries * p.blocks, p.warps, kernel, p.shared_bytes(), p.blocks);
  };
  if (job.in.temperature > 0.0f) run([&] { stats_cluster<kType, true, kGuided>(job, out, p.blocks, p.warps); });
  else run([&] { stats_cluster<kType, false, kGuided>(job, out, p.blocks, p.warps); });
}

template <FloatType kType>
void cluster(const StatsJob& job, const StatsOutputs& out, const StatsClusterPlan& p) {
  if (job.in.null_logits != nullptr) cluster_as<kType, true>(job, out, p);
  else cluster_as<kType, false>(job, out, p);
}

// As run_cluster() there.
void run_cluster(StatsJob job, int64_t entries, const StatsOutputs& out) {
  const StatsClusterPlan plan = plan_stats_cluster(entries, job.in.count, true);
  if (plan.blocks == 0) throw std::runtime_error("no cluster plan for this size");
  job.chunks = job.groups = (job.in.count + kStatsChunk - 1) / kStatsChunk;
  job.group_chunks = 1, job.entries = entries, job.dense = can_load_dense(job.in);
  std::vector<uint32_t> sums(static_cast<size_t>(entries * job.chunks * kSumWords), 0x7FC0DEADu),
      best(static_cast<size_t>(entries * job.groups * kGroupWords), 0x7FC0DEADu);
  job.sums = reinterpret_cast<SumExp*>(sums.data()), job.best = reinterpret_cast<GroupBest*>(best.data());
  switch (job.in.type) {
    case FloatType::f32: return cluster<FloatType::f32>(job, out, plan);
    case FloatType::bf16: return cluster<FloatType::bf16>(job, out, plan);
    case FloatType::f16: return cluster<FloatType::f16>(job, out, plan);
  }
}

}  // namespace

extern "C" {

void emulated_cluster_plan(int64_t entries, int64_t count, int64_t has_clusters, int64_t* out) {
  const StatsClusterPlan p = plan_stats_cluster(entries, count, has_clusters != 0);
  out[0] = p.blocks, out[1] = p.warps;
}
int emulated_stats_cluster(const StatsJob* job, int64_t entries, const StatsOutputs* out) {
  return guarded([&] { run_cluster(*job, entries, *out); });
}

void emulated_plan(int64_t entries, int64_t count, int64_t* out) {
  const StatsPlan p = plan_stats(entries, count);
  out[0] = p.chunks, out[1] = p.group_chunks, out[2] = p.groups, out[3] = p.entries_per_launch;
}
void emulated_state_words(int64_t* out) {
  out[0] = static_cast<int64_t>(offsetof(StatsState, sum) / 4) - StateRow::kSum;
  out[1] = static_cast<int64_t>(offsetof(StatsState, sample) / 4) - StateRow::kSample;
  out[2] = static_cast<int64_t>(offsetof(StatsState, top) / 4) - StateRow::kTop;
}

int emulated_logit_stats(const StatsJob* job, int64_t entries, int64_t group_chunks, int64_t entries_per_launch,
                         const StatsOutputs* out) {
  return guarded([&] {
    run(*job, entries, group_chunks, entries_per_launch,
        [&](const StatsJob& j) { emulate(blocks_for(j.entries), kWarpsPerBlock, [&] { stats_fold(j, *out); }); });
  });
}
int emulated_stats_tile(const StatsJob* job, int64_t entries, int64_t group_chunks, int64_t entries_per_launch,
                        const StateTile* tile) {
  return guarded([&] {
    run(*job, entries, group_chunks, entries_per_launch,
        [&](const StatsJob& j) { emulate(blocks_for(j.entries), kWarpsPerBlock, [&] { stats_fold_tile(j, *tile); }); });
  });
}
int emulated_stats_finish(const StateTile* tile, const StatsOutputs* out, int64_t entries) {
  return guarded([&] { emulate(blocks_for(entries), kWarpsPerBlock, [&] { stats_end(*tile, *out, entries); }); });
}
}
