// fused_head_stats on CUDA: checks, outputs, the plan; three launches (gather the rows asked for, scan, fold), no host read. Kernels:
// head_stats.cuh, for sm_90a; on another device the op says so (unmask.ops.head_stats then goes tile by tile).
#include <tuple>

#include <torch/csrc/stable/ops.h>

#include "common/logit_stats_args.h"
#include "common/register.h"
#include "cuda/common/device.h"
#include "cuda/head_stats_launch.h"
#include "cuda/logit_stats_outputs.h"
#include "cuda/logit_stats_plan.h"

namespace unmask::cuda {
namespace {

constexpr const char* kOp = "fused_head_stats";

// What TMA can describe: dense rows, 16-byte aligned.
void require_dense_rows(const Checker& check, const Tensor& t, const char* name) {
  const bool fits = (t.size(1) == 1 || t.stride(1) == 1) && t.stride(0) > 0 && t.stride(0) * 2 % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  check.require(fits, name, "dense rows at multiples of 16 bytes", t.stride(0));
}

Outputs fused_head_stats(const Tensor& hidden, const Tensor& weight, const OptTensor& rows, const OptTensor& forbid,
                         const OptTensor& suppress, const OptTensor& bias_ids, const OptTensor& bias,
                         const OptTensor& ids, int64_t topk, double temperature, const OptTensor& seed,
                         const OptTensor& step, const OptTensor& pos) {
  const Checker check(kOp, hidden);
  check.floating(hidden, "hidden");
  check.shape(hidden, "hidden", "[M, d]", {-1, -1});
  if (hidden.scalar_type() == ScalarType::Float) fail_must_be(kOp, "hidden", "bfloat16 or float16", "float32");
  check.dtype(weight, "weight", hidden.scalar_type());
  const int64_t width = hidden.size(1);
  check.shape(weight, "weight", "[V, d]", {-1, width});
  const int64_t vocab = weight.size(0);
  check.require(vocab >= 1 && vocab <= INT32_MAX - kHeadIds, "V of weight", "1 to 2147483455", vocab);
  check.require(width >= 8 && width % 8 == 0, "d of hidden", "a multiple of 8", width);
  const StatsRows which = read_stats_rows(check, hidden, rows);
  const StatsArguments args{forbid, suppress, bias_ids, bias, ids, topk, temperature, seed, step, pos};
  StatsInputs in = read_stats_inputs(check, hidden, args, which.entries, 0, vocab);
  in.logits = nullptr, in.count = vocab;
  check.require(which.entries <= kHeadRows, "T'", "at most 64", which.entries);
  require_dense_rows(check, hidden, "hidden");
  require_dense_rows(check, weight, "weight");
  const Launch launch(kOp, hidden);
  const DeviceFacts device = current_device(launch);
  if (!device.has_hopper_kernels())
    launch.refuse(
        "needs a device of compute capability 9.0 and a library compiled for 90a; unmask.ops.head_stats serves others");

  StatsOutputs f;
  Outputs out = new_outputs(hidden, which.entries, in.n_ids, topk, &f);
  if (which.entries == 0) return out;

  const HeadPlan plan = plan_head(which.entries, vocab, device.multiprocessors, device.shared_per_block);
  const Tensor sums = empty(hidden, {which.entries * plan.blocks * kSumWords}, ScalarType::Float);
  const Tensor best = empty(hidden, {which.entries * plan.blocks * kGroupWords}, ScalarType::Int);
  const Tensor id_logit = empty(hidden, {which.entries * std::max<int64_t>(in.n_ids, 1)}, ScalarType::Float);
  std::optional<Tensor> gathered;
  if (rows) gathered = empty(hidden, {which.entries, width}, hidden.scalar_type());
  HeadCall call{};
  call.stats.in = in;
  call.stats.forbid = id_set(forbid), call.stats.suppress = id_set(suppress);
  call.stats.rows = which.rows, call.stats.rows_stride = which.stride, call.stats.n_rows = which.n_rows;
  call.stats.entries = which.entries;
  call.stats.chunks = call.stats.groups = plan.blocks, call.stats.group_chunks = 1;
  call.stats.sums = reinterpret_cast<SumExp*>(data<float>(sums));
  call.stats.best = reinterpret_cast<GroupBest*>(data<int32_t>(best));
  call.stats.id_logit = call.id_logit = data<float>(id_logit);
  call.stats.tree = true;
  call.hidden = hidden.const_data_ptr(), call.weight = weight.const_data_ptr();
  if (gathered) call.gathered = gathered->mutable_data_ptr();
  call.width = width, call.hidden_stride = hidden.stride(0), call.weight_stride = weight.stride(0);
#if defined(UNMASK_WITH_SM90A)
  launch_head_stats(call, plan, f, launch);
#endif
  return out;
}

}  // namespace
}  // namespace unmask::cuda

UNMASK_IMPL(CUDA, fused_head_stats, &unmask::cuda::fused_head_stats)
