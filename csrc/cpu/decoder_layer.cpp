// decoder_layer: one Transformer layer over packed query tokens, its products by oneDNN's packed weights.
//
//   residual += x                                       y = rms_norm(residual, attn_norm)
//   q, k, v = y Wqkv^T (+ bias), heads side by side     K, V -> cache; a = attention(rope(q)) over the cache
//   residual += a Wo^T                                  y = rms_norm(residual, mlp_norm)
//   -> (silu(gate) * up) Wdown^T, [gate | up] = y Wgate_up^T;  without gate_up and down: y, for a mixture of experts
//
// The arithmetic, its order and its roundings are those of the ops add_rms_norm, rope_append, block_attention and silu_mul and of the
// packed product: the same bits. What it saves is everything between them: at 16 to 32 rows a layer's weights empty the caches, so each
// of nine calls from Python finds the interpreter, the dispatcher and the argument checks in memory again, a tenth of the layer at d 512
// (docs/kernels/decoder_layer.md). Rows of padding (row -1, behind the last token) are not computed but zeroed, where that is cheaper.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "common/block_attention_args.h"
#include "common/dense.h"
#include "common/register.h"
#include "cpu/alloc.h"
#include "cpu/layer_parts.h"
#include "cpu/packed_linear.h"

namespace unmask::cpu {
namespace {

using OptTensor = std::optional<Tensor>;

struct Shape { int64_t tokens, width, q_heads, kv_heads, dim; };

// Dense rows, as every part below walks them.
void check_dense(const Checker& check, const Tensor& t, const char* name) {
  if (!dense_rows(t))
    fail_must_be(check.op, name, "dense in its last dimension", "stride " + std::to_string(t.stride(t.dim() - 1)));
}

void check_vector(const Checker& check, const OptTensor& t, const char* name, ScalarType dtype, const char* spec,
                  int64_t size) {
  if (!t) return;
  check.dtype(*t, name, dtype);
  check.shape(*t, name, spec, {size});
  check_dense(check, *t, name);
}

void check_ints(const Checker& check, const Tensor& t, const char* name, const char* spec, int64_t size) {
  check.dtype(t, name, ScalarType::Long);
  check.shape(t, name, spec, {size});
}

Shape check_decoder_layer(const Tensor& x, const Tensor& residual, const Tensor& k_cache, const Tensor& v_cache,
                          const Tensor& qkv, const OptTensor& qkv_bias, const Tensor& o, const OptTensor& gate_up,
                          const OptTensor& down, const Tensor& attn_norm, const Tensor& mlp_norm,
                          const OptTensor& q_norm, const OptTensor& k_norm, const Tensor& inv_freq, const Tensor& row,
                          const Tensor& pos, const Tensor& slot, const Tensor& cu_q, const Tensor& kv_row,
                          const Tensor& seg, const OptTensor& q_end, const OptTensor& mask, double eps, double scale,
                          const OptTensor& token_status, const OptTensor& entry_status) {
  const Checker check("decoder_layer", x);
  const ScalarType dtype = x.scalar_type();
  if (check.cuda || (dtype != ScalarType::Float && dtype != ScalarType::BFloat16))
    fail_must_be(check.op, "x", "float32 or bfloat16 on the CPU", dtype_name(dtype));
  check.dtype(residual, "residual", dtype);
  check.dtype(k_cache, "k_cache", dtype);
  check.dtype(v_cache, "v_cache", dtype);
  check.shape(x, "x", "[T, d]", {-1, -1});
  Shape s{x.size(0), x.size(1), 0, 0, 0};
  check.shape(residual, "residual", "[T, d]", {s.tokens, s.width});
  check_dense(check, x, "x");
  check_dense(check, residual, "residual");
  check.writable(residual, "residual");

  check.shape(k_cache, "k_cache", "[R, Hkv, S, D]", {-1, -1, -1, -1});
  s.kv_heads = k_cache.size(1), s.dim = k_cache.size(3);
  check.shape(v_cache, "v_cache", "[R, Hkv, S, D]", {k_cache.size(0), s.kv_heads, k_cache.size(2), s.dim});
  check.writable(k_cache, "k_cache");
  check.writable(v_cache, "v_cache");
  check.require(s.dim >= 8 && s.dim <= kAttentionMaxDim && s.dim % 8 == 0, "D", "a multiple of 8 in [8, 1024]", s.dim);
  const int64_t joined = check_packed(check, o, "o", dtype, "[d, Hq D]", s.width, -1).in;
  s.q_heads = joined / s.dim;
  if (s.kv_heads < 1 || joined % s.dim != 0 || s.q_heads % s.kv_heads != 0)
    fail_must_be(
        check.op, "o",
        "[d, Hq D] with Hq a multiple of Hkv = " + std::to_string(s.kv_heads) + " and D = " + std::to_string(s.dim),
        shape_text(o));
  const int64_t fused = (s.q_heads + 2 * s.kv_heads) * s.dim;
  check_packed(check, qkv, "qkv", dtype, "[(Hq + 2 Hkv) D, d]", fused, s.width);
  check_vector(check, qkv_bias, "qkv_bias", dtype, "[(Hq + 2 Hkv) D]", fused);
  if (gate_up.has_value() != down.has_value())
    fail_must_be(check.op, gate_up ? "down" : "gate_up", gate_up ? "given with gate_up" : "given with down", "None");
  if (gate_up) {
    const int64_t inner = check_packed(check, *down, "down", dtype, "[d, F]", s.width, -1).in;
    check_packed(check, *gate_up, "gate_up", dtype, "[2 F, d]", 2 * inner, s.width);
  }
  check_vector(check, attn_norm, "attn_norm", dtype, "[d]", s.width);
  check_vector(check, mlp_norm, "mlp_norm", dtype, "[d]", s.width);
  check_vector(check, q_norm, "q_norm", dtype, "[D]", s.dim);
  check_vector(check, k_norm, "k_norm", dtype, "[D]", s.dim);
  check_vector(check, inv_freq, "inv_freq", ScalarType::Float, "[F]", -1);
  if (2 * inv_freq.size(0) > s.dim)
    fail_must_be(check.op, "inv_freq", "[F] with 2F <= D = " + std::to_string(s.dim), shape_text(inv_freq));

  check_ints(check, row, "row", "[T]", s.tokens);
  check_ints(check, pos, "pos", "[T]", s.tokens);
  check_ints(check, slot, "slot", "[T]", s.tokens);
  check_ints(check, kv_row, "kv_row", "[B]", -1);
  const int64_t batch = kv_row.size(0);
  check_ints(check, cu_q, "cu_q", "[B + 1]", batch + 1);
  check.dtype(seg, "seg", ScalarType::Long);
  check.shape(seg, "seg", "[B, G, 2]", {batch, -1, 2});
  if (q_end) check_ints(check, *q_end, "q_end", "[T]", s.tokens);
  if (mask) {
    check.dtype(*mask, "mask", ScalarType::Bool);
    check.shape(*mask, "mask", "[B or 1, Qmax, W]", {mask->dim() == 3 && mask->size(0) == 1 ? 1 : batch, -1, -1});
  }
  if (token_status) {
    check.dtype(*token_status, "token_status", ScalarType::Int);
    check.shape(*token_status, "token_status", "[T]", {s.tokens});
    check.writable(*token_status, "token_status");
  }
  if (entry_status) {
    check.dtype(*entry_status, "entry_status", ScalarType::Int);
    check.shape(*entry_status, "entry_status", "[B]", {batch});
    check.writable(*entry_status, "entry_status");
  }
  check.require(std::isfinite(eps) && eps >= 0.0, "eps", "finite and >= 0", eps);
  check.require(std::isfinite(scale), "scale", "finite", scale);
  return s;
}

// Tokens up to the last one that is no padding.
int64_t live_tokens(const Tensor& row) {
  const auto* of = static_cast<const int64_t*>(row.const_data_ptr());
  const int64_t step = row.stride(0);
  int64_t n = row.size(0);
  while (n > 0 && of[(n - 1) * step] == -1) --n;
  return n;
}

void zero_rows(Tensor& t, int64_t from) {
  const int64_t row = t.size(1) * element_bytes(t);
  if (from < t.size(0))
    std::memset(static_cast<char*>(t.mutable_data_ptr()) + from * row, 0,
                static_cast<size_t>((t.size(0) - from) * row));
}

// Heads [first, first + n) of every token in t [T, all heads x D], dense: a view.
Tensor heads_of(const Tensor& t, int64_t first, int64_t n, int64_t dim) {
  return view<3>(t, {t.size(0), n, dim}, {t.size(1), dim, 1}, first * dim);
}

Tensor decoder_layer(const Tensor& x, Tensor residual, Tensor k_cache, Tensor v_cache, const Tensor& qkv,
                     const OptTensor& qkv_bias, const Tensor& o, const OptTensor& gate_up, const OptTensor& down,
                     const Tensor& attn_norm, const Tensor& mlp_norm, const OptTensor& q_norm, const OptTensor& k_norm,
                     const Tensor& inv_freq, const Tensor& row, const Tensor& pos, const Tensor& slot,
                     const Tensor& cu_q, const Tensor& kv_row, const Tensor& seg, const OptTensor& q_end,
                     const OptTensor& mask, double eps, double scale, OptTensor token_status, OptTensor entry_status) {
  const Shape s = check_decoder_layer(x, residual, k_cache, v_cache, qkv, qkv_bias, o, gate_up, down, attn_norm,
                                      mlp_norm, q_norm, k_norm, inv_freq, row, pos, slot, cu_q, kv_row, seg, q_end,
                                      mask, eps, scale, token_status, entry_status);
  Tensor y = empty_as<2>({s.tokens, s.width}, x);
  Tensor q = empty_as<3>({s.tokens, s.q_heads, s.dim}, x);
  Tensor attended = empty_as<2>({s.tokens, s.q_heads * s.dim}, x);
  Tensor lse = empty<2>({s.tokens, s.q_heads}, ScalarType::Float);
  const auto attend = [&] {
    block_attention_into(q, k_cache, v_cache, cu_q, kv_row, seg, q_end, mask, scale, entry_status, attended, lse);
  };
  if (s.tokens == 0) {
    attend();  // entries without tokens have a status too
    return y;
  }
  const int64_t live = live_tokens(row);
  norm_into(x, &residual, attn_norm, eps, live, y);
  zero_rows(y, live);

  Tensor projected = packed_linear(y, qkv);
  if (qkv_bias) add_rows(projected, *qkv_bias, live);
  rope_append_into(heads_of(projected, 0, s.q_heads, s.dim), heads_of(projected, s.q_heads, s.kv_heads, s.dim),
                   heads_of(projected, s.q_heads + s.kv_heads, s.kv_heads, s.dim), k_cache, v_cache, row, pos, slot,
                   std::nullopt, q_norm, k_norm, inv_freq, eps, token_status, q);
  attend();

  norm_into(packed_linear(attended, o), &residual, mlp_norm, eps, live, y);
  if (!gate_up) return y;
  const Tensor wide = packed_linear(y, *gate_up);
  Tensor inner = empty_as<2>({s.tokens, wide.size(1) / 2}, x);
  silu_mul_into(wide, live, inner);
  zero_rows(inner, live);
  return packed_linear(inner, *down);
}

}  // namespace
}  // namespace unmask::cpu

// Packed tensors bring a dispatch key of their own; with ordinary ones the call must still reach the checks.
UNMASK_IMPL(MkldnnCPU, decoder_layer, &unmask::cpu::decoder_layer)
UNMASK_IMPL(CPU, decoder_layer, &unmask::cpu::decoder_layer)
