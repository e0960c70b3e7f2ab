// moe_route and moe_combine on CUDA: checks (the CPU's own), outputs, three launches and one. No host sync; CUDA graphs can capture the
// calls. Device code: moe_route.cuh.
#include <tuple>

#include <torch/csrc/stable/ops.h>

#include "common/dense.h"
#include "common/moe_route_args.h"
#include "common/register.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/stream.h"
#include "cuda/moe_route.cuh"

namespace unmask::cuda {
namespace {

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, std::make_optional(type));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> moe_route(const Tensor& logits, const std::optional<Tensor>& row,
                                                             const std::optional<Tensor>& bias, int64_t scoring,
                                                             int64_t n_groups, int64_t groups_kept, int64_t top_k,
                                                             bool renormalise, double scale, int64_t multiple) {
  const Checker check("moe_route", logits);
  RouteJob job{};
  RouteParams& p = job.p;
  p = read_route(check, logits, row, bias, scoring, n_groups, groups_kept, top_k, renormalise, scale, multiple);
  const Launch launch(check.op, logits);
  Tensor expert = empty(logits, {p.tokens, top_k}, ScalarType::Long);
  Tensor weight = empty(logits, {p.tokens, top_k}, ScalarType::Float);
  Tensor place = empty(logits, {p.tokens, top_k}, ScalarType::Long);
  Tensor source = empty(logits, {p.capacity}, ScalarType::Long);
  Tensor offsets = empty(logits, {p.experts + 1}, ScalarType::Int);
  const Tensor count = empty(logits, {p.experts}, ScalarType::Int);
  p.expert = static_cast<int64_t*>(expert.mutable_data_ptr());
  p.weight = static_cast<float*>(weight.mutable_data_ptr());
  p.place = static_cast<int64_t*>(place.mutable_data_ptr());
  p.source = static_cast<int64_t*>(source.mutable_data_ptr());
  p.offsets = static_cast<int32_t*>(offsets.mutable_data_ptr());
  job.count = static_cast<int32_t*>(count.mutable_data_ptr());
  if (p.tokens > 0) {
    route_tokens<<<static_cast<unsigned>(p.tokens), 32, static_cast<size_t>(route_shared_bytes(p)), launch.stream>>>(
        job);
    launch.check();
  }
  const auto blocks = static_cast<unsigned>((p.experts + kPairWarps - 1) / kPairWarps);
  count_pairs<<<blocks, kPairWarps * 32, 0, launch.stream>>>(job);
  launch.check();
  place_pairs<<<blocks, kPairWarps * 32, 0, launch.stream>>>(job);
  launch.check();
  return {std::move(expert), std::move(weight), std::move(place), std::move(source), std::move(offsets)};
}

Tensor moe_combine(const Tensor& y, const Tensor& place, const Tensor& weight) {
  check_combine(Checker("moe_combine", y), y, place, weight);
  const int64_t tokens = place.size(0), dim = y.size(1);
  Tensor out = torch::stable::new_empty(y, {tokens, dim});
  if (tokens == 0 || dim == 0) return out;
  const Tensor yd = dense(y);
  const CombineParams p = combine_params(yd, place, weight, out, 0);
  const Launch launch("moe_combine", y);
  const int64_t blocks = (tokens * ((dim + kWarpRun - 1) / kWarpRun) + kRowWarps - 1) / kRowWarps;
  if (blocks > INT32_MAX) launch.refuse("too many rows for one launch: " + std::to_string(blocks) + " blocks of work");
  with_float_type("moe_combine", y, [&](auto type) {
    constexpr FloatType kType = decltype(type)::value;
    const int64_t size = sizeof(typename Element<kType>::Bits);
    const bool aligned = rows_are_aligned(p.y, p.y_row, size) && rows_are_aligned(p.out, dim, size);
    combine_rows<kType><<<static_cast<unsigned>(blocks), kRowWarps * 32, 0, launch.stream>>>(p, aligned);
  });
  launch.check();
  return out;
}

}  // namespace
}  // namespace unmask::cuda

UNMASK_IMPL(CUDA, moe_route, &unmask::cuda::moe_route)
UNMASK_IMPL(CUDA, moe_combine, &unmask::cuda::moe_combine)
