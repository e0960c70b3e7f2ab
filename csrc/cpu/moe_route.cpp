// moe_route and moe_combine on the CPU: checks, outputs, split of the work, and the counting sort of (token, expert) pairs, which is serial:
// a pair costs a nanosecond or two, less than waking a thread pays for below ten thousand of them.
#include <cstring>
#include <tuple>
#include <vector>

#include "common/dense.h"
#include "common/moe_route_args.h"
#include "common/register.h"
#include "cpu/alloc.h"
#include "cpu/moe_route_kernels.h"
#include "cpu/parallel.h"

namespace unmask::cpu {
namespace {

// Per thread that is worth waking it: router logits, ~20 us of work; elements of experts' outputs, ~10 us.
constexpr int64_t kRouteGrain = 16384, kCombineGrain = 65536;

int64_t grain_tokens(int64_t grain, int64_t each) { return each > 0 ? (grain + each - 1) / each : grain; }

// Fills place, source and offsets from expert.
void sort_pairs(const RouteParams& p) {
  std::vector<int64_t> next(static_cast<size_t>(p.experts));  // rows of each expert, then its next free place
  const int64_t pairs = p.tokens * p.top_k;
  for (int64_t i = 0; i < pairs; ++i)
    if (p.expert[i] >= 0) ++next[static_cast<size_t>(p.expert[i])];
  int64_t end = 0;
  for (int64_t e = 0; e < p.experts; ++e) {
    int64_t& at = next[static_cast<size_t>(e)];
    const int64_t rows = p.padded(at);
    p.offsets[e] = static_cast<int32_t>(end);
    at = end;
    end += rows;
  }
  p.offsets[p.experts] = static_cast<int32_t>(end);
  if (p.capacity > 0) std::memset(p.source, 0, static_cast<size_t>(p.capacity) * sizeof(int64_t));
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int64_t i = t * p.top_k; i < (t + 1) * p.top_k; ++i) {
      if (p.expert[i] < 0) {
        p.place[i] = -1;
        continue;
      }
      const int64_t at = next[static_cast<size_t>(p.expert[i])]++;
      p.place[i] = at;
      p.source[at] = t;
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> moe_route(const Tensor& logits, const std::optional<Tensor>& row,
                                                             const std::optional<Tensor>& bias, int64_t scoring,
                                                             int64_t n_groups, int64_t groups_kept, int64_t top_k,
                                                             bool renormalise, double scale, int64_t multiple) {
  const Checker check("moe_route", logits);
  RouteParams p =
      read_route(check, logits, row, bias, scoring, n_groups, groups_kept, top_k, renormalise, scale, multiple);
  Tensor expert = empty<2>({p.tokens, top_k}, ScalarType::Long),
         weight = empty<2>({p.tokens, top_k}, ScalarType::Float);
  Tensor place = empty<2>({p.tokens, top_k}, ScalarType::Long), source = empty<1>({p.capacity}, ScalarType::Long);
  Tensor offsets = empty<1>({p.experts + 1}, ScalarType::Int);
  p.expert = static_cast<int64_t*>(expert.mutable_data_ptr());
  p.weight = static_cast<float*>(weight.mutable_data_ptr());
  p.place = static_cast<int64_t*>(place.mutable_data_ptr());
  p.source = static_cast<int64_t*>(source.mutable_data_ptr());
  p.offsets = static_cast<int32_t*>(offsets.mutable_data_ptr());
  const auto kernel = UNMASK_KERNEL(route_tokens);
  parallel_for(p.tokens, grain_tokens(kRouteGrain, p.experts),
               [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  sort_pairs(p);
  return {std::move(expert), std::move(weight), std::move(place), std::move(source), std::move(offsets)};
}

Tensor moe_combine(const Tensor& y, const Tensor& place, const Tensor& weight) {
  check_combine(Checker("moe_combine", y), y, place, weight);
  const int64_t tokens = place.size(0), dim = y.size(1);
  Tensor out = empty_as<2>({tokens, dim}, y);
  if (tokens == 0 || dim == 0) return out;
  const Tensor yd = dense(y);
  const CombineParams p = combine_params(yd, place, weight, out, dtype_code(y));
  const auto kernel = UNMASK_KERNEL(combine_rows);
  const int64_t grain = grain_tokens(kCombineGrain, dim * (p.top_k > 0 ? p.top_k : 1));
  parallel_for(tokens, grain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return out;
}

}  // namespace
}  // namespace unmask::cpu

UNMASK_IMPL(CPU, moe_route, &unmask::cpu::moe_route)
UNMASK_IMPL(CPU, moe_combine, &unmask::cpu::moe_combine)
