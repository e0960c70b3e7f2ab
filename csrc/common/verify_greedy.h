// verify_greedy as plain data and control flow, one header for the CPU and CUDA; who compares the contents of two nodes is the caller's.
#pragma once
#include <cstdint>

#include "common/status.h"
#include "common/strided.h"

namespace unmask {

struct GreedyInputs {
  const int64_t *node, *after;
  int64_t node_stride[3], after_stride[3];  // row, node, place; elements
  int64_t rows, nodes, width;
  const int64_t* parent;  // nullptr: a linear chain
  int64_t parent_stride[2];
  Strided<const int64_t> count;
  int64_t mask_id;
  bool subset;
  Strided<int32_t> status;  // may be absent
  int64_t *last, *length;  // dense, [rows]

  UNMASK_HD int64_t parent_of(int64_t row, int64_t j) const {
    return parent != nullptr ? parent[row * parent_stride[0] + j * parent_stride[1]] : j - 1;
  }
  UNMASK_HD bool count_fits(int64_t row) const { return count[row] >= 0 && count[row] <= nodes; }
  UNMASK_HD bool parent_fits(int64_t row, int64_t j) const {
    const int64_t p = parent_of(row, j);
    return p >= -1 && p < j;
  }
  // Whether place i of node j says what node `from` became.
  UNMASK_HD bool agrees(int64_t row, int64_t from, int64_t j, int64_t i) const {
    const int64_t token = node[row * node_stride[0] + j * node_stride[1] + i * node_stride[2]];
    return (subset && token == mask_id) ||
           token == after[row * after_stride[0] + from * after_stride[1] + i * after_stride[2]];
  }
};

struct GreedyPath { int64_t last, length; };

// matches(from, j): every place of node j agrees with what node `from` became. A row whose contents have been checked.
template <class Matches>
UNMASK_HD GreedyPath walk_nodes(const GreedyInputs& in, int64_t row, const Matches& matches) {
  const int64_t count = in.count[row];
  if (count == 0) return {-1, 0};
  GreedyPath path{0, 1};
  if (!in.subset) {  // children come after their parents, so one pass meets the lowest child of every node of the path
    for (int64_t j = 1; j < count; ++j)
      if (in.parent_of(row, j) == path.last && matches(path.last, j)) path = {j, path.length + 1};
    return path;
  }
  for (int64_t j = count - 1; j > path.last; --j) {
    if (!matches(path.last, j)) continue;
    path = {j, path.length + 1};
    j = count;  // from the furthest node again, now against what this one became
  }
  return path;
}

}  // namespace unmask
