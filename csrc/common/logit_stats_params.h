// Arguments of the logit statistics as plain pointers and element strides, the same on every backend.
#pragma once
#include <cstdint>

#include "common/float_type.h"
#include "common/online.h"

namespace unmask {

constexpr int kStatsFields = 6;  // p, p1, p2, entropy, logsumexp, 1 - p

// Ids [offset, offset + count) of the vocabulary; offset is a multiple of kStatsChunk.
struct StatsInputs {
  const void* logits;
  FloatType type;
  int64_t row_stride, col_stride;  // elements
  int64_t offset, count, vocab;
  const int64_t* bias_ids;  // [T', n_bias]
  const float* bias;
  int64_t n_bias, bias_ids_stride[2], bias_stride[2];
  const int64_t* ids;  // [T', n_ids]
  int64_t n_ids, ids_stride[2];
  const int64_t *seed, *step, *pos;  // [T'], used if temperature > 0
  int64_t seed_stride, step_stride, pos_stride;
  float temperature;
  int32_t kept;  // max(2, topk)
  // Not null: the logits are u + guidance (c - u), rounded to `type` after each operation; c lies at `logits`, u here.
  const void* null_logits;
  int64_t null_row_stride, null_col_stride;
  float guidance;
};

// Dense outputs, one tensor per dtype.
struct StatsOutputs {
  int64_t topk, n_ids;
  int64_t* ids;  // [T', 1 + topk]: token | top-k ids
  float*
      values;  // [T', 6 + 2 n_ids + topk]: p, p1, p2, entropy, logsumexp, 1 - p | (log-probability, logit) per id | top-k logits
  int32_t* status;  // [T']

  UNMASK_HD int64_t id_width() const { return 1 + topk; }
  UNMASK_HD int64_t value_width() const { return kStatsFields + 2 * n_ids + topk; }
  UNMASK_HD int64_t* token(int64_t entry) const { return ids + entry * id_width(); }
  UNMASK_HD int64_t* topk_id(int64_t entry) const { return token(entry) + 1; }
  UNMASK_HD float* stats(int64_t entry) const { return values + entry * value_width(); }
  UNMASK_HD float* at_ids(int64_t entry) const { return stats(entry) + kStatsFields; }
  UNMASK_HD float* topk_logit(int64_t entry) const { return at_ids(entry) + 2 * n_ids; }

  UNMASK_HD void write(int64_t entry, const EntryStats& r) const {
    *token(entry) = r.token;
    status[entry] = r.status;
    float* x = stats(entry);
    x[0] = r.p, x[1] = r.p1, x[2] = r.p2, x[3] = r.entropy, x[4] = r.logsumexp, x[5] = r.p_rest;
  }
};

}  // namespace unmask
