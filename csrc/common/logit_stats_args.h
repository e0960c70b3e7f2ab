// Argument checks of logit_stats, stats_tile and stats_finish, the same on every backend.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "common/check.h"
#include "common/logit_stats_params.h"
#include "common/online.h"

namespace unmask {

using OptTensor = std::optional<Tensor>;

constexpr double kMaxTemperature = 1e30;  // keeps T * g + x above -inf for every finite fp32 x

// What logit_stats and stats_tile share beyond the logits themselves.
struct StatsArguments {
  const OptTensor &forbid, &suppress, &bias_ids, &bias, &ids;
  int64_t topk;
  double temperature;
  const OptTensor &seed, &step, &pos;
};

inline void check_id_list(const Checker& check, const OptTensor& t, const char* name, const char* spec) {
  if (!t) return;
  check.dtype(*t, name, ScalarType::Long);
  check.shape(*t, name, spec, {-1});
}

// Sets *ptr; returns the stride.
inline int64_t read_noise_key(const Checker& check, const OptTensor& t, const char* name, bool needed, int64_t entries,
                              const int64_t** ptr) {
  if (!t) {
    if (needed) fail_must_be(check.op, name, "given when temperature > 0", "None");
    return 0;
  }
  check.dtype(*t, name, ScalarType::Long);
  check.shape(*t, name, "[T']", {entries});
  *ptr = static_cast<const int64_t*>(t->const_data_ptr());
  return t->stride(0);
}

// Everything but `rows`, `state` and what a backend does with the forbid and suppress lists, whose dtype and shape are
// checked here.
inline StatsInputs read_stats_inputs(const Checker& check, const Tensor& logits, const StatsArguments& in,
                                     int64_t entries, int64_t offset, int64_t vocab) {
  StatsInputs a{};
  const ScalarType type = logits.scalar_type();
  a.logits = logits.const_data_ptr();
  a.type = type == ScalarType::Float ? FloatType::f32 : type == ScalarType::BFloat16 ? FloatType::bf16 : FloatType::f16;
  a.row_stride = logits.stride(0);
  a.col_stride = logits.size(1) == 1 ? 1 : logits.stride(1);
  a.offset = offset;
  a.count = logits.size(1);
  a.vocab = vocab;
  check.require(in.topk >= 0 && in.topk <= kTopMax, "topk", "0 to 8", in.topk);
  check.require(in.temperature >= 0.0 && in.temperature <= kMaxTemperature, "temperature", "a number in [0, 1e30]",
                in.temperature);
  check_id_list(check, in.forbid, "forbid", "[F]");
  check_id_list(check, in.suppress, "suppress", "[U]");
  if (in.bias_ids.has_value() != in.bias.has_value())
    fail_must_be(check.op, in.bias ? "bias_ids" : "bias", in.bias ? "given with bias" : "given with bias_ids", "None");
  if (in.bias_ids) {
    check.dtype(*in.bias_ids, "bias_ids", ScalarType::Long);
    check.dtype(*in.bias, "bias", ScalarType::Float);
    check.shape(*in.bias_ids, "bias_ids", "[T', J]", {entries, -1});
    a.n_bias = in.bias_ids->size(1);
    check.shape(*in.bias, "bias", "[T', J]", {entries, a.n_bias});
    a.bias_ids = static_cast<const int64_t*>(in.bias_ids->const_data_ptr());
    a.bias = static_cast<const float*>(in.bias->const_data_ptr());
    for (int d = 0; d < 2; ++d) {
      a.bias_ids_stride[d] = in.bias_ids->stride(d);
      a.bias_stride[d] = in.bias->stride(d);
    }
  }
  if (in.ids) {
    check.dtype(*in.ids, "ids", ScalarType::Long);
    check.shape(*in.ids, "ids", "[T', J]", {entries, -1});
    a.n_ids = in.ids->size(1);
    a.ids = static_cast<const int64_t*>(in.ids->const_data_ptr());
    for (int d = 0; d < 2; ++d) a.ids_stride[d] = in.ids->stride(d);
  }
  a.temperature = static_cast<float>(in.temperature);
  a.kept = static_cast<int32_t>(std::max<int64_t>(2, in.topk));
  const bool sampled = in.temperature > 0.0;
  a.seed_stride = read_noise_key(check, in.seed, "seed", sampled, entries, &a.seed);
  a.step_stride = read_noise_key(check, in.step, "step", sampled, entries, &a.step);
  a.pos_stride = read_noise_key(check, in.pos, "pos", sampled, entries, &a.pos);
  return a;
}

// After read_stats_rows and read_stats_inputs.
inline void read_null_logits(const Checker& check, const Tensor& logits, const OptTensor& null_logits, double guidance,
                             StatsInputs* a) {
  if (null_logits) {
    check.dtype(*null_logits, "null_logits", logits.scalar_type());
    check.shape(*null_logits, "null_logits", "[N, V]", {logits.size(0), logits.size(1)});
    a->null_logits = null_logits->const_data_ptr();
    a->null_row_stride = null_logits->stride(0);
    a->null_col_stride = logits.size(1) == 1 ? 1 : null_logits->stride(1);
  }
  check.require(std::abs(guidance) <= std::numeric_limits<float>::max(), "guidance", "finite in float32", guidance);
  if (!null_logits && guidance != 1.0) fail_must_be(check.op, "null_logits", "given when guidance is not 1", "None");
  a->guidance = static_cast<float>(guidance);
}

// Which row each entry reads.
struct StatsRows {
  const int64_t* rows;  // nullptr: entry e reads row e
  int64_t stride, entries, n_rows;
};

inline StatsRows read_stats_rows_of(const Checker& check, int64_t n_rows, const OptTensor& rows) {
  if (!rows) return {nullptr, 0, n_rows, n_rows};
  check.dtype(*rows, "rows", ScalarType::Long);
  check.shape(*rows, "rows", "[T']", {-1});
  return {static_cast<const int64_t*>(rows->const_data_ptr()), rows->stride(0), rows->size(0), n_rows};
}

inline StatsRows read_stats_rows(const Checker& check, const Tensor& logits, const OptTensor& rows) {
  check.floating(logits, "logits");
  check.shape(logits, "logits", "[N, V]", {-1, -1});
  const int64_t n = logits.size(0), vocab = logits.size(1);
  check.require(vocab >= 1 && vocab <= INT32_MAX, "V of logits", "1 to 2147483647", vocab);
  return read_stats_rows_of(check, n, rows);
}

inline void check_stats_state(const Checker& check, const Tensor& state, const OptTensor& id_logit, int64_t entries) {
  check.dtype(state, "state", ScalarType::Int);
  check.shape(state, "state", "[T', STATE_WORDS]", {entries, kStateWords});
  if (id_logit) {
    check.dtype(*id_logit, "id_logit", ScalarType::Float);
    check.shape(*id_logit, "id_logit", "[T', J]", {entries, -1});
  }
}

inline void check_stats_tile(const Checker& check, const Tensor& logits, const Tensor& state, const OptTensor& id_logit,
                             int64_t offset, int64_t vocab) {
  check.floating(logits, "logits");
  check.shape(logits, "logits", "[T', C]", {-1, -1});
  const int64_t count = logits.size(1);
  check_stats_state(check, state, id_logit, logits.size(0));
  check.writable(state, "state");
  if (id_logit) check.writable(*id_logit, "id_logit");
  check.require(vocab >= 1 && vocab <= INT32_MAX, "vocab", "1 to 2147483647", vocab);
  check.require(offset >= 0 && offset < vocab && offset % kStatsChunk == 0, "offset",
                "a multiple of 4096 in [0, vocab)", offset);
  check.require(count >= 1 && count <= vocab - offset && (count % kStatsChunk == 0 || offset + count == vocab),
                "C of logits", "a multiple of 4096, or the rest of the vocabulary", count);
}

// After read_stats_inputs: id_logit comes with ids, one column each.
inline void check_id_logit(const Checker& check, const OptTensor& ids, const OptTensor& id_logit, int64_t entries,
                           int64_t n_ids) {
  if (ids.has_value() != id_logit.has_value())
    fail_must_be(check.op, ids ? "id_logit" : "ids", ids ? "given with ids" : "given with id_logit", "None");
  if (id_logit) check.shape(*id_logit, "id_logit", "[T', J]", {entries, n_ids});
}

inline int64_t check_stats_finish(const Checker& check, const Tensor& state, const OptTensor& id_logit, int64_t topk) {
  check.shape(state, "state", "[T', STATE_WORDS]", {-1, kStateWords});
  const int64_t entries = state.size(0);
  check_stats_state(check, state, id_logit, entries);
  check.require(topk >= 0 && topk <= kTopMax, "topk", "0 to 8", topk);
  return entries;
}

}  // namespace unmask
