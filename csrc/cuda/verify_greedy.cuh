// verify_greedy on CUDA, device side: one warp a row. A comparison of two nodes takes 32 places at a time and ends at the first that differ.
//
// Formula: common/verify_greedy.h. Layout: node, after [B, N, W] int64 with any strides. Bytes: 16 W a comparison, at most one a node on a chain
// or tree, N (N - 1) / 2 in all for a fixed point. A row is some 10 KB and depends on itself alone, node after node: the bound is latency, some
// two loads a comparison, and a warp a row is all the parallelism there is.
#pragma once
#include "common/verify_greedy.h"
#include "cuda/common/warp.cuh"

namespace unmask::cuda {

constexpr int kGreedyWarps = 4;

UNMASK_DEVICE bool nodes_match(const GreedyInputs& in, int64_t row, int64_t from, int64_t j) {
  for (int64_t base = 0; base < in.width; base += 32) {
    const int64_t i = base + lane_id();
    if (warp_ballot(i < in.width && !in.agrees(row, from, j, i)) != 0) return false;
  }
  return true;
}

UNMASK_DEVICE bool row_fits(const GreedyInputs& in, int64_t row) {
  if (!in.count_fits(row)) return false;
  bool bad = false;
  for (int64_t j = lane_id(); j < in.count[row]; j += 32) bad = bad || !in.parent_fits(row, j);
  return warp_ballot(bad) == 0;
}

UNMASK_KERNEL_BOUNDS(kGreedyWarps * 32, 8) verify_rows(const GreedyInputs in) {
  const int64_t row = block_index() * kGreedyWarps + warp_in_block();
  if (row >= in.rows) return;
  GreedyPath path{-1, 0};
  const bool fits = row_fits(in, row);
  if (fits) path = walk_nodes(in, row, [&](int64_t from, int64_t j) { return nodes_match(in, row, from, j); });
  if (lane_id() != 0) return;
  if (!fits && in.status) in.status[row] |= kStatusBadSegment;
  in.last[row] = path.last, in.length[row] = path.length;
}

}  // namespace unmask::cuda
