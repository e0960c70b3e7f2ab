// Argument checks of block_attention, the same on every backend.
#pragma once
#include <cmath>

#include "common/check.h"

namespace unmask {

constexpr int64_t kAttentionMaxDim = 1024;

inline void check_block_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& cu_q,
                                  const Tensor& kv_row, const Tensor& seg, const std::optional<Tensor>& q_end,
                                  const std::optional<Tensor>& mask, double scale,
                                  const std::optional<Tensor>& status) {
  const Checker check("block_attention", q);
  check.floating(q, "q");
  const ScalarType dtype = q.scalar_type();
  check.dtype(k_cache, "k_cache", dtype);
  check.dtype(v_cache, "v_cache", dtype);
  check.dtype(cu_q, "cu_q", ScalarType::Long);
  check.dtype(kv_row, "kv_row", ScalarType::Long);
  check.dtype(seg, "seg", ScalarType::Long);
  if (q_end) check.dtype(*q_end, "q_end", ScalarType::Long);
  if (mask) check.dtype(*mask, "mask", ScalarType::Bool);
  if (status) check.dtype(*status, "status", ScalarType::Int);

  check.shape(q, "q", "[T, Hq, D]", {-1, -1, -1});
  const int64_t tokens = q.size(0), heads = q.size(1), dim = q.size(2);
  check.shape(k_cache, "k_cache", "[R, Hkv, S, D]", {-1, -1, -1, dim});
  const int64_t kv_heads = k_cache.size(1);
  check.shape(v_cache, "v_cache", "[R, Hkv, S, D]", {k_cache.size(0), kv_heads, k_cache.size(2), dim});
  check.shape(kv_row, "kv_row", "[B]", {-1});
  const int64_t batch = kv_row.size(0);
  check.shape(cu_q, "cu_q", "[B + 1]", {batch + 1});
  check.shape(seg, "seg", "[B, G, 2]", {batch, -1, 2});
  if (q_end) check.shape(*q_end, "q_end", "[T]", {tokens});
  if (mask) {
    check.shape(*mask, "mask", "[B or 1, Qmax, W]", {mask->dim() == 3 && mask->size(0) == 1 ? 1 : batch, -1, -1});
  }
  if (status) check.shape(*status, "status", "[B]", {batch});

  check.require(dim >= 8 && dim <= kAttentionMaxDim && dim % 8 == 0, "D", "a multiple of 8 in [8, 1024]", dim);
  if (kv_heads < 1 || heads % kv_heads != 0)
    fail_must_be("block_attention", "Hq", "a multiple of Hkv = " + std::to_string(kv_heads), std::to_string(heads));
  check.require(std::isfinite(scale), "scale", "finite", scale);
  if (status) check.writable(*status, "status");
}

}  // namespace unmask
