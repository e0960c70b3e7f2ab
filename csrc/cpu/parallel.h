// torch's own parallel_for, reached through the stable ABI: it honours torch.set_num_threads and never nests.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <cstdint>

namespace unmask::cpu {
// Runs f(begin, end) over [0, n). At most one level deep; n <= grain runs on the calling thread.
template <class F>
inline void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (n <= grain) {
    f(int64_t{0}, n);
    return;
  }
  torch::stable::parallel_for(0, n, grain, f);
}
inline int64_t num_threads() { return static_cast<int64_t>(torch::stable::get_num_threads()); }
}  // namespace unmask::cpu
