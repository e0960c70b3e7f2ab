// Argument checks of kl_stats, the same on every backend.
#pragma once
#include <cstdint>
#include <optional>

#include "common/check.h"
#include "common/kl_stats.h"

namespace unmask {

// Sets *ptr and *stride.
inline void read_kl_rows(const Checker& check, const std::optional<Tensor>& t, const char* name, int64_t entries,
                         const int64_t** ptr, int64_t* stride) {
  if (!t) return;
  check.dtype(*t, name, ScalarType::Long);
  check.shape(*t, name, "[T']", {entries});
  *ptr = static_cast<const int64_t*>(t->const_data_ptr());
  *stride = t->stride(0);
}

inline KlInputs read_kl_inputs(const Checker& check, const Tensor& logits, const Tensor& previous,
                               const std::optional<Tensor>& rows, const std::optional<Tensor>& previous_rows,
                               const Tensor& lse, const Tensor& previous_lse) {
  KlInputs a{};
  check.floating(logits, "logits");
  const ScalarType type = logits.scalar_type();
  check.dtype(previous, "previous", type);
  check.shape(logits, "logits", "[N, V]", {-1, -1});
  a.n_rows = logits.size(0);
  a.vocab = logits.size(1);
  check.require(a.vocab >= 1 && a.vocab <= INT32_MAX, "V of logits", "1 to 2147483647", a.vocab);
  check.shape(previous, "previous", "[M, V]", {-1, a.vocab});
  a.n_previous = previous.size(0);
  check.dtype(lse, "lse", ScalarType::Float);
  check.dtype(previous_lse, "previous_lse", ScalarType::Float);
  check.shape(lse, "lse", "[T']", {rows ? int64_t{-1} : a.n_rows});
  const int64_t entries = lse.size(0);
  check.shape(previous_lse, "previous_lse", "[T']", {entries});
  read_kl_rows(check, rows, "rows", entries, &a.rows, &a.rows_stride);
  read_kl_rows(check, previous_rows, "previous_rows", entries, &a.previous_rows, &a.previous_rows_stride);
  if (!previous_rows) check.shape(previous, "previous", "[T', V] without previous_rows", {entries, a.vocab});
  a.type = type == ScalarType::Float ? FloatType::f32 : type == ScalarType::BFloat16 ? FloatType::bf16 : FloatType::f16;
  a.logits = logits.const_data_ptr();
  a.previous = previous.const_data_ptr();
  a.stride[0] = logits.stride(0);
  a.previous_stride[0] = previous.stride(0);
  a.stride[1] = a.vocab == 1 ? 1 : logits.stride(1);
  a.previous_stride[1] = a.vocab == 1 ? 1 : previous.stride(1);
  a.lse = static_cast<const float*>(lse.const_data_ptr());
  a.previous_lse = static_cast<const float*>(previous_lse.const_data_ptr());
  a.lse_stride = lse.stride(0);
  a.previous_lse_stride = previous_lse.stride(0);
  return a;
}

}  // namespace unmask
