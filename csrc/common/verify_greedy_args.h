// Argument checks of verify_greedy, the same on every backend.
#pragma once
#include "common/check.h"
#include "common/verify_greedy.h"

namespace unmask {

// Everything but the outputs.
inline GreedyInputs read_greedy_inputs(const Tensor& node, const Tensor& after, const std::optional<Tensor>& parent,
                                       const Tensor& count, int64_t mask_id, bool subset,
                                       const std::optional<Tensor>& status) {
  const Checker check("verify_greedy", node);
  check.dtype(node, "node", ScalarType::Long);
  check.dtype(after, "after", ScalarType::Long);
  if (parent) check.dtype(*parent, "parent", ScalarType::Long);
  check.dtype(count, "count", ScalarType::Long);
  if (status) check.dtype(*status, "status", ScalarType::Int);
  check.shape(node, "node", "[B, N, W]", {-1, -1, -1});
  GreedyInputs in{};
  in.rows = node.size(0), in.nodes = node.size(1), in.width = node.size(2);
  check.shape(after, "after", "[B, N, W]", {in.rows, in.nodes, in.width});
  if (parent) check.shape(*parent, "parent", "[B, N]", {in.rows, in.nodes});
  check.shape(count, "count", "[B]", {in.rows});
  if (status) check.shape(*status, "status", "[B]", {in.rows});
  if (subset && parent) fail_must_be(check.op, "parent", "None when subset is set", "a tensor");
  if (status) check.writable(*status, "status");

  in.node = static_cast<const int64_t*>(node.const_data_ptr());
  in.after = static_cast<const int64_t*>(after.const_data_ptr());
  for (int d = 0; d < 3; ++d) in.node_stride[d] = node.stride(d), in.after_stride[d] = after.stride(d);
  if (parent) {
    in.parent = static_cast<const int64_t*>(parent->const_data_ptr());
    for (int d = 0; d < 2; ++d) in.parent_stride[d] = parent->stride(d);
  }
  in.count = {static_cast<const int64_t*>(count.const_data_ptr()), count.stride(0)};
  in.mask_id = mask_id, in.subset = subset;
  if (status) in.status = {static_cast<int32_t*>(status->mutable_data_ptr()), status->stride(0)};
  return in;
}

}  // namespace unmask
