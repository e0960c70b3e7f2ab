// Argument checks of rope_append, the same on every backend.
#pragma once
#include <cmath>

#include <algorithm>

#include "common/check.h"
#include "common/rope_append_params.h"

namespace unmask {

inline void check_rope_append(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                              const Tensor& v_cache, const Tensor& row, const Tensor& pos, const Tensor& slot,
                              const std::optional<Tensor>& v_slot, const std::optional<Tensor>& q_weight,
                              const std::optional<Tensor>& k_weight, const Tensor& inv_freq, double eps,
                              const std::optional<Tensor>& status) {
  const Checker check("rope_append", q);
  check.floating(q, "q");
  const ScalarType dtype = q.scalar_type();
  check.dtype(k, "k", dtype);
  check.dtype(v, "v", dtype);
  check.dtype(k_cache, "k_cache", dtype);
  check.dtype(v_cache, "v_cache", dtype);
  check.dtype(row, "row", ScalarType::Long);
  check.dtype(pos, "pos", ScalarType::Long);
  check.dtype(slot, "slot", ScalarType::Long);
  if (v_slot) check.dtype(*v_slot, "v_slot", ScalarType::Long);
  if (q_weight) check.dtype(*q_weight, "q_weight", dtype);
  if (k_weight) check.dtype(*k_weight, "k_weight", dtype);
  check.dtype(inv_freq, "inv_freq", ScalarType::Float);
  if (status) check.dtype(*status, "status", ScalarType::Int);

  check.shape(q, "q", "[T, Hq, D]", {-1, -1, -1});
  const auto q_sizes = q.sizes(), cache_sizes = k_cache.sizes();
  const int64_t tokens = q_sizes[0], dim = q_sizes[2];
  check.shape(k, "k", "[T, Hkv, D]", {tokens, -1, dim});
  const int64_t heads = k.size(1);
  check.shape(v, "v", "[T, Hkv, D]", {tokens, heads, dim});
  check.shape(k_cache, "k_cache", "[R, Hkv, S, D]", {-1, heads, -1, dim});
  check.shape(v_cache, "v_cache", "[R, Hkv, S, D]", {cache_sizes[0], heads, cache_sizes[2], dim});
  check.shape(row, "row", "[T]", {tokens});
  check.shape(pos, "pos", "[T]", {tokens});
  check.shape(slot, "slot", "[T]", {tokens});
  if (v_slot) check.shape(*v_slot, "v_slot", "[T]", {tokens});
  if (q_weight) check.shape(*q_weight, "q_weight", "[D]", {dim});
  if (k_weight) check.shape(*k_weight, "k_weight", "[D]", {dim});
  check.shape(inv_freq, "inv_freq", "[F]", {-1});
  if (status) check.shape(*status, "status", "[T]", {tokens});

  if (2 * inv_freq.size(0) > dim)
    fail_must_be("rope_append", "inv_freq", "[F] with 2F <= D = " + std::to_string(dim), shape_text(inv_freq));
  check.require(std::isfinite(eps) && eps >= 0.0, "eps", "finite and >= 0", eps);
  check.writable(k_cache, "k_cache");
  check.writable(v_cache, "v_cache");
  if (status) check.writable(*status, "status");
}

// After check_rope_append. weights and freq: dense; vs: v_slot, or slot; dtype as the backend's kernel names it.
inline RopeParams rope_params(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                              const Tensor& v_cache, const Tensor& row, const Tensor& pos, const Tensor& slot,
                              const Tensor& vs, const std::optional<Tensor>& q_weight,
                              const std::optional<Tensor>& k_weight, const Tensor& freq, double eps,
                              const std::optional<Tensor>& status, const Tensor& out, int64_t dtype) {
  const auto ints = [](const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); };
  const auto strides = [](const Tensor& t, int64_t* to) {
    const auto from = t.strides();
    std::copy_n(from.data(), from.size(), to);
  };
  RopeParams p{};
  const auto q_sizes = q.sizes(), cache_sizes = k_cache.sizes();
  p.tokens = q_sizes[0], p.q_heads = q_sizes[1], p.dim = q_sizes[2], p.freqs = freq.size(0);
  p.rows = cache_sizes[0], p.kv_heads = cache_sizes[1], p.slots = cache_sizes[2];
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.out = out.mutable_data_ptr(), p.k_cache = k_cache.mutable_data_ptr(), p.v_cache = v_cache.mutable_data_ptr();
  p.row = ints(row), p.pos = ints(pos), p.slot = ints(slot), p.v_slot = ints(vs);
  p.row_stride = row.stride(0), p.pos_stride = pos.stride(0), p.slot_stride = slot.stride(0);
  p.v_slot_stride = vs.stride(0);
  p.q_weight = q_weight ? q_weight->const_data_ptr() : nullptr;
  p.k_weight = k_weight ? k_weight->const_data_ptr() : nullptr;
  p.inv_freq = static_cast<const float*>(freq.const_data_ptr());
  if (status) p.status = static_cast<int32_t*>(status->mutable_data_ptr()), p.status_stride = status->stride(0);
  strides(q, p.q_stride), strides(k, p.k_stride), strides(v, p.v_stride);
  strides(k_cache, p.k_cache_stride), strides(v_cache, p.v_cache_stride);
  p.dtype = dtype, p.eps = static_cast<float>(eps);
  return p;
}

}  // namespace unmask
