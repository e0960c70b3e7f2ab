// verify_greedy on CUDA: checks (the CPU's own), outputs, one launch. No host sync; CUDA graphs can capture the call. Device code: verify_greedy.cuh.
#include <tuple>

#include <torch/csrc/stable/ops.h>

#include "common/register.h"
#include "common/verify_greedy_args.h"
#include "cuda/common/stream.h"
#include "cuda/verify_greedy.cuh"

namespace unmask::cuda {
namespace {

std::tuple<Tensor, Tensor> verify_greedy(const Tensor& node, const Tensor& after, const std::optional<Tensor>& parent,
                                         const Tensor& count, int64_t mask_id, bool subset,
                                         std::optional<Tensor> status) {
  GreedyInputs in = read_greedy_inputs(node, after, parent, count, mask_id, subset, status);
  const Launch launch("verify_greedy", node);
  Tensor last = torch::stable::new_empty(node, {in.rows}, std::make_optional(ScalarType::Long));
  Tensor length = torch::stable::new_empty(node, {in.rows}, std::make_optional(ScalarType::Long));
  in.last = static_cast<int64_t*>(last.mutable_data_ptr());
  in.length = static_cast<int64_t*>(length.mutable_data_ptr());
  if (in.rows > 0) {
    verify_rows<<<static_cast<unsigned>((in.rows + kGreedyWarps - 1) / kGreedyWarps), kGreedyWarps * 32, 0,
                  launch.stream>>>(in);
    launch.check();
  }
  return {std::move(last), std::move(length)};
}

}  // namespace
}  // namespace unmask::cuda

UNMASK_IMPL(CUDA, verify_greedy, &unmask::cuda::verify_greedy)
