// A list of ids as the CPU kernels want it: sorted, without negative ids; ids >= vocab are left out and reported.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/status.h"

namespace unmask {

struct IdList {
  std::array<int32_t, 8> small;
  std::vector<int32_t> large;
  const int32_t* ids = nullptr;
  int64_t n = 0;

  void read(const std::optional<Tensor>& t, int64_t vocab, int32_t* status) {
    if (!t) return;
    const int64_t count = t->size(0), stride = t->stride(0);
    const auto* src = static_cast<const int64_t*>(t->const_data_ptr());
    int32_t* out = small.data();
    if (count > static_cast<int64_t>(small.size())) {
      large.resize(static_cast<size_t>(count));
      out = large.data();
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t id = src[i * stride];
      if (id >= vocab) *status |= kStatusBadId;
      else if (id >= 0) out[n++] = static_cast<int32_t>(id);
    }
    std::sort(out, out + n);
    ids = out;
  }
};

}  // namespace unmask
