// The CUDA kernel of commit on the CPU (emulate_warp.h), behind a C function that tests/test_cuda_emulated_commit.py calls by ctypes.
#include "emulate_warp.h"

#include <algorithm>
#include <vector>

#include "cuda/commit.cuh"
#include "emulate_arguments.h"

using namespace unmask;
using namespace unmask::cuda;

extern "C" {

// pointers: canvas, masked, cu, row, pos, token, quota, cost, score, threshold, eligible, editable, status, committed, count, left
// numbers: canvas stride (2), masked stride (2), rows, length, candidates, entries, rule, then the strides of cu .. status (11),
//          score is float64, threshold is float64
int emulated_commit(void** p, const int64_t* n, double param, double edit_threshold) {
  CommitParams c{};
  c.canvas = static_cast<int64_t*>(p[0]), c.masked = static_cast<bool*>(p[1]);
  for (int d = 0; d < 2; ++d) c.canvas_stride[d] = n[d], c.masked_stride[d] = n[2 + d];
  c.rows = n[4], c.length = n[5], c.candidates = n[6], c.entries = n[7], c.rule = n[8];
  const int64_t* s = n + 9;
  c.cu = strided<const int64_t>(p[2], s[0]), c.row = strided<const int64_t>(p[3], s[1]);
  c.pos = strided<const int64_t>(p[4], s[2]), c.token = strided<const int64_t>(p[5], s[3]);
  c.quota = strided<const int64_t>(p[6], s[4]), c.cost = strided<const float>(p[7], s[5]);
  c.score = {p[8], s[6], n[20] != 0}, c.threshold = {p[9], s[7], n[21] != 0};
  c.eligible = strided<const bool>(p[10], s[8]), c.editable = strided<const bool>(p[11], s[9]);
  c.status = strided<int32_t>(p[12], s[10]);
  c.param = param, c.edit_threshold = edit_threshold;
  c.committed = static_cast<bool*>(p[13]);
  c.count = static_cast<int64_t*>(p[14]), c.left = static_cast<int64_t*>(p[15]);
  std::vector<int32_t> place(static_cast<size_t>(c.candidates), -7), order(place);
  const CommitJob job{c, static_cast<uint8_t*>(p[13]), place.data(),
                      c.rule == kRuleEntropyBound ? order.data() : nullptr};
  return guarded([&] {
    if (c.entries == 0) std::fill_n(c.committed, c.candidates, false);
    emulate((c.entries + kCommitWarps - 1) / kCommitWarps, kCommitWarps, [&] { commit_entries(job); },
            kCommitSharedBytes);
  });
}
}
