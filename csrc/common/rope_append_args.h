// Argument checks of rope_append, the same on every backend.
#pragma once
#include <cmath>

#include "common/check.h"

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

}  // namespace unmask
