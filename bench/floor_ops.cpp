// What torch charges for a call before any of our code runs: ops with the signatures of unmask's own that read nothing and return new
// one-element tensors. Built and loaded by bench_overhead.py only.
#include <optional>
#include <tuple>
#include <vector>

#include "common/register.h"
#include "cpu/alloc.h"

namespace {

using torch::stable::Tensor;
using unmask::ScalarType;
using In = const Tensor&;
using Opt = const std::optional<Tensor>&;
using Mut = std::optional<Tensor>;

Tensor out() { return unmask::cpu::empty<1>({1}, ScalarType::Float); }

Tensor one(In) { return out(); }
Tensor norm(In, In, double) { return out(); }
Tensor add_norm(Tensor, In, In, double) { return out(); }
Tensor uniform(In, In, In) { return out(); }
Tensor rope(In, In, In, Tensor, Tensor, In, In, In, Opt, Opt, Opt, In, double, Mut) { return out(); }
std::tuple<Tensor, Tensor> attention(In, In, In, In, In, In, Opt, Opt, double, Mut, bool) { return {out(), out()}; }
std::tuple<Tensor, Tensor, Tensor> stats(In, Opt, Opt, Opt, Opt, Opt, Opt, int64_t, double, Opt, Opt, Opt, Opt,
                                         double) {
  return {out(), out(), out()};
}
std::tuple<Tensor, Tensor, Tensor> filtered(In, Opt, Opt, Opt, Opt, Opt, double, double, int64_t, bool, Opt, Opt, Opt) {
  return {out(), out(), out()};
}
Tensor kl(In, In, Opt, Opt, In, In) { return out(); }
void tile(In, Tensor, Mut, int64_t, int64_t, Opt, Opt, Opt, Opt, Opt, int64_t, double, Opt, Opt, Opt) {}
std::tuple<Tensor, Tensor, Tensor> finish(In, Opt, int64_t) { return {out(), out(), out()}; }
std::tuple<Tensor, Tensor, Tensor> commit(Tensor, Tensor, In, In, In, In, In, Opt, Opt, Opt, int64_t,
                                          const std::vector<double>&, Opt, Opt, Mut) {
  return {out(), out(), out()};
}
std::tuple<Tensor, Tensor> greedy(In, In, Opt, In, int64_t, bool, Mut) { return {out(), out()}; }
std::tuple<Tensor, Tensor, Tensor, Tensor> ratio(In, In, In, In, In, In, Opt, Opt, Opt, Opt, Opt, double, double,
                                                 bool) {
  return {out(), out(), out(), out()};
}
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route(In, Opt, Opt, int64_t, int64_t, int64_t, int64_t, bool, double,
                                                         int64_t) {
  return {out(), out(), out(), out(), out()};
}
Tensor combine(In, In, In) { return out(); }

}  // namespace

// The schemas come from the ops themselves (floor_ops.py), so a signature that has drifted fails to load.
STABLE_TORCH_LIBRARY_IMPL(unmask_floor, CPU, m) {
  m.impl("uniform", TORCH_BOX(&uniform));
  m.impl("rms_norm", TORCH_BOX(&norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_norm));
  m.impl("silu_mul", TORCH_BOX(&one));
  m.impl("rope_append", TORCH_BOX(&rope));
  m.impl("block_attention", TORCH_BOX(&attention));
  m.impl("logit_stats", TORCH_BOX(&stats));
  m.impl("filtered_stats", TORCH_BOX(&filtered));
  m.impl("kl_stats", TORCH_BOX(&kl));
  m.impl("stats_tile", TORCH_BOX(&tile));
  m.impl("stats_finish", TORCH_BOX(&finish));
  m.impl("commit", TORCH_BOX(&commit));
  m.impl("verify_greedy", TORCH_BOX(&greedy));
  m.impl("verify_ratio", TORCH_BOX(&ratio));
  m.impl("moe_route", TORCH_BOX(&route));
  m.impl("moe_combine", TORCH_BOX(&combine));
}
