// uniform(seed[N], step[N], pos[N]) -> float32 [N] in (0, 1): one draw per entry, word x of philox(seed; 0, pos, step, 1).
// The last counter word is 1 here and 0 for the per-id noise of logit_stats, so the two never share bits.
#include <torch/csrc/stable/ops.h>
#include "common/philox.h"
#include "common/register.h"
#include "common/uniform_args.h"

namespace unmask::cpu {
namespace {

Tensor uniform(const Tensor& seed, const Tensor& step, const Tensor& pos) {
  const int64_t n = check_uniform(seed, step, pos);
  Tensor out = torch::stable::new_empty(seed, {n}, std::make_optional(ScalarType::Float));
  const auto* s = static_cast<const int64_t*>(seed.const_data_ptr());
  const auto* t = static_cast<const int64_t*>(step.const_data_ptr());
  const auto* p = static_cast<const int64_t*>(pos.const_data_ptr());
  auto* o = static_cast<float*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    o[i] = uniform_from_bits(philox(static_cast<uint64_t>(s[i * seed.stride(0)]), 0u,
                                    static_cast<uint32_t>(p[i * pos.stride(0)]),
                                    static_cast<uint32_t>(t[i * step.stride(0)]), 1u)
                                 .x);
  }
  return out;
}

}  // namespace
}  // namespace unmask::cpu

UNMASK_IMPL(CPU, uniform, &unmask::cpu::uniform)
