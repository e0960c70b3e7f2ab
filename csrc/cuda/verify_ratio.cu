// verify_ratio on CUDA: checks (the CPU's own), outputs, workspace, three to five launches. No host sync: what is drawn, and where, stays on the
// device, and a span without a rejection costs the draw nothing but empty warps. CUDA graphs can capture the call. Device code: verify_ratio.cuh.
#include "common/register.h"
#include "common/verify_ratio_args.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/stream.h"
#include "cuda/logit_stats_outputs.h"
#include "cuda/verify_ratio.cuh"

namespace unmask::cuda {
namespace {

bool can_load_dense(const RatioSide& side, FloatType type) {
  const int64_t size = type == FloatType::f32 ? 4 : 2;
  return side.stride[1] == 1 && reinterpret_cast<uintptr_t>(side.logits) % 16 == 0 && side.stride[0] * size % 16 == 0;
}

unsigned blocks_of(int64_t warps) { return static_cast<unsigned>((warps + kWarpsPerBlock - 1) / kWarpsPerBlock); }

template <FloatType kType>
void launch_all(const Launch& launch, const RatioJob& job) {
  constexpr int kThreads = kWarpsPerBlock * 32;
  const int64_t positions = job.in.positions, spans = job.in.spans;
  if (positions > 0) {
    ratio_sums<kType><<<blocks_of(positions * 2 * job.chunks), kThreads, 0, launch.stream>>>(job);
    launch.check();
    ratio_judge<kType><<<blocks_of(positions), kThreads, 0, launch.stream>>>(job);
    launch.check();
  }
  if (spans == 0) return;
  ratio_walk<<<blocks_of(spans), kThreads, 0, launch.stream>>>(job);
  launch.check();
  if (!job.in.resample || positions == 0) return;
  ratio_draws<kType><<<blocks_of(spans * job.chunks), kThreads, 0, launch.stream>>>(job);
  launch.check();
  ratio_next<<<blocks_of(spans), kThreads, 0, launch.stream>>>(job);
  launch.check();
}

RatioTensors verify_ratio(const Checker& check, const RatioArguments& in) {
  const Tensor& like = in.p_logits;
  RatioJob job{};
  job.in = read_ratio_inputs(check, in);
  const Launch launch(check.op, like);
  job.forbid = id_set(in.forbid);
  job.chunks = (job.in.vocab + kStatsChunk - 1) / kStatsChunk;
  for (int s = 0; s < 2; ++s) job.dense[s] = can_load_dense(job.in.side[s], job.in.type);
  const int64_t positions = job.in.positions, spans = job.in.spans;
  check.require(positions <= INT32_MAX / job.chunks, "N of p_row", "at most 2147483647 chunks of 4096 ids a side",
                positions);
  Tensor accepted = empty(like, {spans}, ScalarType::Long), next = empty(like, {spans}, ScalarType::Long);
  Tensor log_ratio = empty(like, {positions}, ScalarType::Float), status = empty(like, {spans}, ScalarType::Int);
  job.out = {data<int64_t>(accepted), data<int64_t>(next), data<float>(log_ratio), data<int32_t>(status)};

  constexpr int64_t kSumWords = sizeof(SumExp) / 4, kDrawWords = sizeof(ResidualDraw) / 4;
  const Tensor parts = empty(like, {positions, 2, job.chunks, kSumWords}, ScalarType::Float);
  const Tensor sums = empty(like, {positions, 2, kSumWords}, ScalarType::Float);
  const Tensor judged = empty(like, {2, positions}, ScalarType::Int);
  const Tensor rejected = empty(like, {spans}, ScalarType::Long);
  const Tensor draws = empty(like, {in.resample ? spans : 0, job.chunks, kDrawWords}, ScalarType::Float);
  job.parts = static_cast<SumExp*>(parts.mutable_data_ptr());
  job.sums = static_cast<SumExp*>(sums.mutable_data_ptr());
  job.verdict = data<int32_t>(judged), job.bits = job.verdict + positions;
  job.rejected = data<int64_t>(rejected);
  job.draws = static_cast<ResidualDraw*>(draws.mutable_data_ptr());
  with_float_type(check.op, like, [&](auto type) { launch_all<decltype(type)::value>(launch, job); });
  return {std::move(accepted), std::move(next), std::move(log_ratio), std::move(status)};
}

}  // namespace
}  // namespace unmask::cuda

UNMASK_IMPL(CUDA, verify_ratio, &unmask::verify_ratio_op<&unmask::cuda::verify_ratio>)
