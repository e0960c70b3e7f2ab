// moe_experts: SwiGLU experts for the tokens that chose them, their products by oneDNN's packed weights, weighted and added up.
//
//   out[t] = round(sum over j of weight[t, j] * expert[t, j](x[t])) (+ shared(x[t]), rounded)
//   expert(x) = (silu(gate) * up) Wdown^T, [gate | up] = x Wgate_up^T
//
// Experts one after the other, in the order of their numbers: its tokens' rows are gathered into one small buffer, which stays in the cache
// from expert to expert, padded to a multiple of kPackedRows, so that a token has the same bits in any batch. The bits are those of the
// products, silu_mul and moe_combine one by one. A denoise step goes through dozens of experts with one or two tokens each: two calls from
// Python, a copy and a share of a concatenation for each took a fifth of the layer (docs/kernels/decoder_layer.md).
#include <algorithm>
#include <cstring>
#include <vector>

#include "common/dense.h"
#include "common/moe_route_args.h"
#include "common/register.h"
#include "cpu/alloc.h"
#include "cpu/layer_parts.h"
#include "cpu/moe_route_kernels.h"
#include "cpu/packed_linear.h"
#include "cpu/parallel.h"

namespace unmask::cpu {
namespace {

using OptTensor = std::optional<Tensor>;

constexpr int64_t kCombineGrain = 65536;  // elements per thread that are worth waking it: ~10 us

int64_t padded(int64_t rows) { return (rows + kPackedRows - 1) / kPackedRows * kPackedRows; }

// One expert's pairs (token, j-th choice), as t * K + j.
struct Group { int64_t begin, rows; };

// pairs: grouped by expert, tokens in order; groups: of the experts that have any, in the order of their numbers.
struct Groups {
  std::vector<int64_t> pairs;
  std::vector<Group> groups;
  int64_t largest = 0;
};

Groups grouped(const Checker& check, const std::vector<int64_t>& expert) {
  std::vector<int64_t> count(kMaxExperts);
  for (int64_t e : expert) {
    if (e >= kMaxExperts) check.require(false, "expert", "below 4096", e);
    if (e >= 0) ++count[static_cast<size_t>(e)];
  }
  Groups g;
  int64_t end = 0;
  for (int64_t& n : count) {
    if (n > 0) g.groups.push_back({end, n}), g.largest = std::max(g.largest, n);
    const int64_t begin = end;
    end += n;
    n = begin;  // from here on the next free place
  }
  g.pairs.resize(static_cast<size_t>(end));
  for (size_t i = 0; i < expert.size(); ++i)
    if (expert[i] >= 0) g.pairs[static_cast<size_t>(count[static_cast<size_t>(expert[i])]++)] = static_cast<int64_t>(i);
  return g;
}

// The first `rows` rows of t [M, N], dense: a view, or t itself.
Tensor first_rows(const Tensor& t, int64_t rows) {
  return rows == t.size(0) ? t : view<2>(t, {rows, t.size(1)}, {t.size(1), 1});
}

Tensor zeros(int64_t rows, int64_t width, const Tensor& like) {
  Tensor t = empty_as<2>({rows, width}, like);
  const auto bytes = static_cast<size_t>(rows * width * element_bytes(like));
  if (bytes > 0) std::memset(t.mutable_data_ptr(), 0, bytes);
  return t;
}

// F of a SwiGLU's packed weights gate_up [2 F, d] and down [d, F].
int64_t check_swiglu(const Checker& check, const Tensor& gate_up, const char* gate_up_name, const Tensor& down,
                     const char* down_name, ScalarType dtype, int64_t width, int64_t inner) {
  inner = check_packed(check, down, down_name, dtype, "[d, F]", width, inner).in;
  check_packed(check, gate_up, gate_up_name, dtype, "[2 F, d]", 2 * inner, width);
  return inner;
}

Tensor moe_experts(const Tensor& x, const Tensor& expert, const Tensor& weight, const std::vector<Tensor>& gate_up,
                   const std::vector<Tensor>& down, const OptTensor& shared_gate_up, const OptTensor& shared_down) {
  const Checker check("moe_experts", x);
  const ScalarType dtype = x.scalar_type();
  if (check.cuda || (dtype != ScalarType::Float && dtype != ScalarType::BFloat16))
    fail_must_be(check.op, "x", "float32 or bfloat16 on the CPU", dtype_name(dtype));
  check.dtype(expert, "expert", ScalarType::Long);
  check.dtype(weight, "weight", ScalarType::Float);
  check.shape(x, "x", "[T, d]", {-1, -1});
  const int64_t tokens = x.size(0), width = x.size(1);
  check.shape(expert, "expert", "[T, K]", {tokens, -1});
  const int64_t top_k = expert.size(1);
  check.shape(weight, "weight", "[T, K]", {tokens, top_k});
  std::vector<int64_t> chosen(static_cast<size_t>(tokens * top_k));
  const auto* from = static_cast<const int64_t*>(expert.const_data_ptr());
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < top_k; ++j)
      chosen[static_cast<size_t>(t * top_k + j)] = from[t * expert.stride(0) + j * expert.stride(1)];
  const Groups g = grouped(check, chosen);
  for (const auto& [list, name] : {std::pair(&gate_up, "gate_up"), std::pair(&down, "down")})
    if (list->size() != g.groups.size())
      fail_must_be(
          check.op, name,
          "a list of the weights of the " + std::to_string(g.groups.size()) + " experts that occur in expert, in order",
          std::to_string(list->size()) + " weights");
  int64_t inner = -1;
  for (size_t e = 0; e < gate_up.size(); ++e)
    inner = check_swiglu(check, gate_up[e], "a weight of gate_up", down[e], "a weight of down", dtype, width, inner);
  if (shared_gate_up.has_value() != shared_down.has_value())
    fail_must_be(check.op, shared_gate_up ? "shared_down" : "shared_gate_up",
                 shared_gate_up ? "given with shared_gate_up" : "given with shared_down", "None");
  int64_t shared_inner = 0;
  if (shared_gate_up)
    shared_inner =
        check_swiglu(check, *shared_gate_up, "shared_gate_up", *shared_down, "shared_down", dtype, width, -1);

  Tensor out = empty_as<2>({tokens, width}, x);
  if (tokens == 0 || width == 0) return out;
  const Tensor xd = dense(x);
  const int64_t bytes = width * element_bytes(x), step = xd.stride(0) * element_bytes(x);
  const int64_t most = padded(g.largest);
  Tensor y = empty_as<2>({tokens * top_k, width}, x);  // a row per pair
  // The rows behind a group's own are padding: zeros, or what a longer group left there.
  Tensor gathered = zeros(most, width, x), middle = zeros(most, std::max<int64_t>(inner, 0), x);
  const char* rows = static_cast<const char*>(xd.const_data_ptr());
  char *in = static_cast<char*>(gathered.mutable_data_ptr()), *to = static_cast<char*>(y.mutable_data_ptr());
  for (size_t e = 0; e < g.groups.size(); ++e) {
    const auto [begin, n] = g.groups[e];
    const int64_t* pair = g.pairs.data() + begin;
    for (int64_t i = 0; i < n; ++i)
      std::memcpy(in + i * bytes, rows + pair[i] / top_k * step, static_cast<size_t>(bytes));
    silu_mul_into(packed_linear(first_rows(gathered, padded(n)), gate_up[e]), n, middle);
    const Tensor result = packed_linear(first_rows(middle, padded(n)), down[e]);
    const char* at = static_cast<const char*>(result.const_data_ptr());
    for (int64_t i = 0; i < n; ++i) std::memcpy(to + pair[i] * bytes, at + i * bytes, static_cast<size_t>(bytes));
  }

  for (size_t i = 0; i < chosen.size(); ++i)
    chosen[i] = chosen[i] < 0 ? -1 : static_cast<int64_t>(i);  // a pair's row of y
  const CombineParams p{y.const_data_ptr(),
                        width,
                        tokens * top_k,
                        width,
                        dtype_code(y),
                        chosen.data(),
                        {top_k, 1},
                        static_cast<const float*>(weight.const_data_ptr()),
                        {weight.stride(0), weight.stride(1)},
                        tokens,
                        top_k,
                        out.mutable_data_ptr()};
  const auto combine = UNMASK_KERNEL(combine_rows);
  const int64_t each = width * std::max<int64_t>(top_k, 1);
  parallel_for(tokens, (kCombineGrain + each - 1) / each, [&](int64_t begin, int64_t end) { combine(p, begin, end); });
  if (!shared_gate_up) return out;
  Tensor wide = empty_as<2>({tokens, shared_inner}, x);
  silu_mul_into(packed_linear(xd, *shared_gate_up), tokens, wide);
  add_rows(out, packed_linear(wide, *shared_down), tokens);
  return out;
}

}  // namespace
}  // namespace unmask::cpu

// Packed weights bring a dispatch key of their own; with ordinary ones, or none, the call must still reach the checks.
UNMASK_IMPL(MkldnnCPU, moe_experts, &unmask::cpu::moe_experts)
UNMASK_IMPL(CPU, moe_experts, &unmask::cpu::moe_experts)
