// logit_stats / stats_tile / stats_finish on CUDA: checks (the CPU's own), outputs, the split of the work, launches. No
// host sync, and no memory besides torch tensors, so CUDA graphs can capture the calls. Device code: logit_stats.cuh,
// logit_stats_fold.cuh, logit_stats_kernels.cuh.
#include <tuple>

#include <torch/csrc/stable/ops.h>

#include "common/logit_stats_args.h"
#include "common/register.h"
#include "cuda/common/device.h"
#include "cuda/logit_stats_kernels.cuh"
#include "cuda/logit_stats_outputs.h"
#include "cuda/logit_stats_plan.h"

namespace unmask::cuda {
namespace {

unsigned blocks_for(int64_t warps) { return static_cast<unsigned>((warps + kWarpsPerBlock - 1) / kWarpsPerBlock); }

template <FloatType kType, bool kGuided>
void launch_scan_as(const StatsJob& job, const Launch& launch) {
  const auto kernel = job.in.temperature > 0.0f ? stats_scan<kType, true, kGuided> : stats_scan<kType, false, kGuided>;
  kernel<<<blocks_for(job.entries * job.groups), kWarpsPerBlock * 32, 0, launch.stream>>>(job);
  launch.check();
}

template <FloatType kType>
void launch_scan(const StatsJob& job, const Launch& launch) {
  if (job.in.null_logits != nullptr) launch_scan_as<kType, true>(job, launch);
  else launch_scan_as<kType, false>(job, launch);
}

void launch_scan_typed(const StatsJob& job, const Launch& launch, const char* op) {
  switch (job.in.type) {
    case FloatType::f32: return launch_scan<FloatType::f32>(job, launch);
    case FloatType::bf16: return launch_scan<FloatType::bf16>(job, launch);
    case FloatType::f16: return launch_scan<FloatType::f16>(job, launch);
  }
  fail_must_be(op, "logits", "float32, bfloat16 or float16",
               "dtype code " + std::to_string(static_cast<int>(job.in.type)));
}

// Scans and folds all entries, as many at a time as one workspace of bounded size holds; fold(job) launches the second
// kernel.
template <class Fold>
void run(StatsJob job, int64_t entries, const Tensor& like, const Launch& launch, const char* op, const Fold& fold) {
  if (entries == 0) return;
  const StatsPlan plan = plan_stats(entries, job.in.count);
  job.chunks = plan.chunks;
  job.group_chunks = plan.group_chunks;
  job.groups = plan.groups;
  const Tensor sums = empty(like, {plan.entries_per_launch * plan.chunks * kSumWords}, ScalarType::Float);
  const Tensor best = empty(like, {plan.entries_per_launch * plan.groups * kGroupWords}, ScalarType::Int);
  job.sums = reinterpret_cast<SumExp*>(data<float>(sums));
  job.best = reinterpret_cast<GroupBest*>(data<int32_t>(best));
  for (int64_t begin = 0; begin < entries; begin += plan.entries_per_launch) {
    job.entry_begin = begin;
    job.entries = std::min(entries - begin, plan.entries_per_launch);
    launch_scan_typed(job, launch, op);
    fold(job);
    launch.check();
  }
}

template <FloatType kType, bool kGuided>
void launch_cluster_as(const StatsJob& job, const StatsOutputs& out, const StatsClusterPlan& plan,
                       const Launch& launch) {
  const auto kernel =
      job.in.temperature > 0.0f ? stats_cluster<kType, true, kGuided> : stats_cluster<kType, false, kGuided>;
  launch_clusters(launch, kernel, job.entries * plan.blocks, plan.warps * 32, plan.shared_bytes(), plan.blocks, job,
                  out, plan.blocks, plan.warps);
}

template <FloatType kType>
void launch_cluster(const StatsJob& job, const StatsOutputs& out, const StatsClusterPlan& plan, const Launch& launch) {
  if (job.in.null_logits != nullptr) launch_cluster_as<kType, true>(job, out, plan, launch);
  else launch_cluster_as<kType, false>(job, out, plan, launch);
}

// Scan and fold in one launch.
void run_cluster(StatsJob job, int64_t entries, const Tensor& like, const Launch& launch, const char* op,
                 const StatsClusterPlan& plan, const StatsOutputs& out) {
  if (entries == 0) return;
  job.chunks = job.groups = (job.in.count + kStatsChunk - 1) / kStatsChunk;
  job.group_chunks = 1;
  job.entries = entries;
  const Tensor sums = empty(like, {entries * job.chunks * kSumWords}, ScalarType::Float);
  const Tensor best = empty(like, {entries * job.groups * kGroupWords}, ScalarType::Int);
  job.sums = reinterpret_cast<SumExp*>(data<float>(sums));
  job.best = reinterpret_cast<GroupBest*>(data<int32_t>(best));
  switch (job.in.type) {
    case FloatType::f32: return launch_cluster<FloatType::f32>(job, out, plan, launch);
    case FloatType::bf16: return launch_cluster<FloatType::bf16>(job, out, plan, launch);
    case FloatType::f16: return launch_cluster<FloatType::f16>(job, out, plan, launch);
  }
  fail_must_be(op, "logits", "float32, bfloat16 or float16",
               "dtype code " + std::to_string(static_cast<int>(job.in.type)));
}

StatsJob new_job(const StatsInputs& in, const StatsArguments& args, const StatsRows& rows) {
  StatsJob job{};
  job.in = in;
  job.forbid = id_set(args.forbid);
  job.suppress = id_set(args.suppress);
  job.rows = rows.rows;
  job.rows_stride = rows.stride;
  job.n_rows = rows.n_rows;
  job.dense = can_load_dense(in);
  return job;
}

Outputs logit_stats(const Tensor& logits, const OptTensor& rows, const OptTensor& forbid, const OptTensor& suppress,
                    const OptTensor& bias_ids, const OptTensor& bias, const OptTensor& ids, int64_t topk,
                    double temperature, const OptTensor& seed, const OptTensor& step, const OptTensor& pos,
                    const OptTensor& null_logits, double guidance) {
  const Checker check("logit_stats", logits);
  const StatsRows which = read_stats_rows(check, logits, rows);
  const StatsArguments args{forbid, suppress, bias_ids, bias, ids, topk, temperature, seed, step, pos};
  StatsInputs in = read_stats_inputs(check, logits, args, which.entries, 0, logits.size(1));
  read_null_logits(check, logits, null_logits, guidance, &in);
  const Launch launch(check.op, logits);
  StatsOutputs f;
  Outputs out = new_outputs(logits, which.entries, in.n_ids, topk, &f);
  const StatsClusterPlan cluster = plan_stats_cluster(which.entries, in.count, current_device(launch).has_clusters());
  if (cluster.blocks > 0) {
    run_cluster(new_job(in, args, which), which.entries, logits, launch, check.op, cluster, f);
    return out;
  }
  run(new_job(in, args, which), which.entries, logits, launch, check.op, [&](const StatsJob& job) {
    stats_fold<<<blocks_for(job.entries), kWarpsPerBlock * 32, 0, launch.stream>>>(job, f);
  });
  return out;
}

StateTile state_tile(const Tensor& state, const OptTensor& id_logit) {
  StateTile tile{data<int32_t>(state), {state.stride(0), state.stride(1)}, nullptr, {0, 0}};
  if (id_logit) {
    tile.id_logit = data<float>(*id_logit);
    for (int d = 0; d < 2; ++d) tile.id_stride[d] = id_logit->stride(d);
  }
  return tile;
}

void stats_tile(const Tensor& logits, Tensor& state, OptTensor id_logit, int64_t offset, int64_t vocab,
                const OptTensor& forbid, const OptTensor& suppress, const OptTensor& bias_ids, const OptTensor& bias,
                const OptTensor& ids, int64_t topk, double temperature, const OptTensor& seed, const OptTensor& step,
                const OptTensor& pos) {
  const Checker check("stats_tile", logits);
  check_stats_tile(check, logits, state, id_logit, offset, vocab);
  const int64_t entries = logits.size(0);
  const StatsArguments args{forbid, suppress, bias_ids, bias, ids, topk, temperature, seed, step, pos};
  const StatsInputs in = read_stats_inputs(check, logits, args, entries, offset, vocab);
  check_id_logit(check, ids, id_logit, entries, in.n_ids);
  const Launch launch(check.op, logits);
  const StateTile tile = state_tile(state, id_logit);
  run(new_job(in, args, {nullptr, 0, entries, entries}), entries, logits, launch, check.op, [&](const StatsJob& job) {
    stats_fold_tile<<<blocks_for(job.entries), kWarpsPerBlock * 32, 0, launch.stream>>>(job, tile);
  });
}

Outputs stats_finish(const Tensor& state, const OptTensor& id_logit, int64_t topk) {
  const Checker check("stats_finish", state);
  const int64_t entries = check_stats_finish(check, state, id_logit, topk);
  const Launch launch(check.op, state);
  StatsOutputs f;
  Outputs out = new_outputs(state, entries, id_logit ? id_logit->size(1) : 0, topk, &f);
  if (entries == 0) return out;
  stats_end<<<blocks_for(entries), kWarpsPerBlock * 32, 0, launch.stream>>>(state_tile(state, id_logit), f, entries);
  launch.check();
  return out;
}

}  // namespace
}  // namespace unmask::cuda

UNMASK_IMPL(CUDA, logit_stats, &unmask::cuda::logit_stats)
UNMASK_IMPL(CUDA, stats_tile, &unmask::cuda::stats_tile)
UNMASK_IMPL(CUDA, stats_finish, &unmask::cuda::stats_finish)
