// commit on CUDA: checks (the CPU's own), outputs, one launch. No host sync, and no memory besides torch tensors, so CUDA graphs can
// capture the call. Device code: commit.cuh.
#include <tuple>

#include <torch/csrc/stable/ops.h>

#include "common/commit_args.h"
#include "common/register.h"
#include "cuda/commit.cuh"
#include "cuda/common/stream.h"

namespace unmask::cuda {
namespace {

Tensor empty(const Tensor& like, int64_t n, ScalarType type) {
  return torch::stable::new_empty(like, {n}, std::make_optional(type));
}

std::tuple<Tensor, Tensor, Tensor> commit(Tensor canvas, Tensor masked, const Tensor& cu, const Tensor& row,
                                          const Tensor& pos, const Tensor& token, const Tensor& score,
                                          const std::optional<Tensor>& cost, const std::optional<Tensor>& eligible,
                                          const std::optional<Tensor>& editable, int64_t rule,
                                          const std::vector<double>& params, const std::optional<Tensor>& quota,
                                          const std::optional<Tensor>& threshold, std::optional<Tensor> status) {
  check_commit(canvas, masked, cu, row, pos, token, score, cost, eligible, editable, rule, params, quota, threshold,
               status);
  const int64_t batch = row.size(0), n = pos.size(0);
  Checker("commit", canvas).require(n <= INT32_MAX, "N of pos", "at most 2147483647", n);
  const Launch launch("commit", canvas);
  Tensor committed = empty(canvas, n, ScalarType::Bool);
  Tensor count = empty(canvas, batch, ScalarType::Long), left = empty(canvas, batch, ScalarType::Long);
  if (n > 0 && batch == 0) {  // else the kernel answers for candidates that no entry owns
    launch.check(cudaMemsetAsync(committed.mutable_data_ptr(), 0, static_cast<size_t>(n), launch.stream));
  }
  if (batch > 0) {
    const bool ordered = rule == kRuleEntropyBound;
    const Tensor work = empty(canvas, ordered ? 2 * n : n, ScalarType::Int);
    CommitJob job{commit_params(canvas, masked, cu, row, pos, token, score, cost, eligible, editable, rule, params,
                                quota, threshold, status, committed, count, left),
                  nullptr, nullptr, nullptr};
    job.state = static_cast<uint8_t*>(committed.mutable_data_ptr());
    job.place = static_cast<int32_t*>(work.mutable_data_ptr());
    job.order = ordered ? job.place + n : nullptr;
    commit_entries<<<static_cast<unsigned>((batch + kCommitWarps - 1) / kCommitWarps), kCommitWarps * 32,
                     kCommitSharedBytes, launch.stream>>>(job);
    launch.check();
  }
  return {std::move(committed), std::move(count), std::move(left)};
}

}  // namespace
}  // namespace unmask::cuda

UNMASK_IMPL(CUDA, commit, &unmask::cuda::commit)
