// verify_greedy on the CPU: each row walks its nodes on one thread and leaves a comparison at the first place that differs. Rows are independent.
#include <tuple>

#include "common/register.h"
#include "common/verify_greedy_args.h"
#include "cpu/alloc.h"
#include "cpu/parallel.h"

namespace unmask::cpu {
namespace {

constexpr int64_t kParallelFrom = 1 << 16;  // places per thread: some 50 us

bool row_fits(const GreedyInputs& in, int64_t row) {
  if (!in.count_fits(row)) return false;
  for (int64_t j = 0; j < in.count[row]; ++j)
    if (!in.parent_fits(row, j)) return false;
  return true;
}

void verify_row(const GreedyInputs& in, int64_t row) {
  GreedyPath path{-1, 0};
  if (row_fits(in, row)) {
    path = walk_nodes(in, row, [&](int64_t from, int64_t j) {
      int64_t i = 0;
      while (i < in.width && in.agrees(row, from, j, i)) ++i;
      return i == in.width;
    });
  } else if (in.status) {
    in.status[row] |= kStatusBadSegment;
  }
  in.last[row] = path.last, in.length[row] = path.length;
}

std::tuple<Tensor, Tensor> verify_greedy(const Tensor& node, const Tensor& after, const std::optional<Tensor>& parent,
                                         const Tensor& count, int64_t mask_id, bool subset,
                                         std::optional<Tensor> status) {
  GreedyInputs in = read_greedy_inputs(node, after, parent, count, mask_id, subset, status);
  Tensor last = empty<1>({in.rows}, ScalarType::Long), length = empty<1>({in.rows}, ScalarType::Long);
  in.last = static_cast<int64_t*>(last.mutable_data_ptr());
  in.length = static_cast<int64_t*>(length.mutable_data_ptr());
  const int64_t places = 1 + in.nodes * in.width;
  parallel_for(in.rows, 1 + kParallelFrom / places, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) verify_row(in, row);
  });
  return {std::move(last), std::move(length)};
}

}  // namespace
}  // namespace unmask::cpu

UNMASK_IMPL(CPU, verify_greedy, &unmask::cpu::verify_greedy)
