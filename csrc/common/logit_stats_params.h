// Arguments of the logit statistics as plain pointers and element strides, the same on every backend.
#pragma once
#include <cstdint>

namespace unmask {

enum class LogitType : int32_t { f32, bf16, f16 };

// Ids [offset, offset + count) of the vocabulary; offset is a multiple of kStatsChunk.
struct StatsInputs {
  const void* logits;
  LogitType type;
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
};

struct StatsOutputs {
  int64_t topk, n_ids;
  int64_t* token;     // [T']
  float* stats;       // [T', 5]
  int32_t* status;    // [T']
  float* at_ids;      // [T', n_ids, 2]: log-probability, logit
  int64_t* topk_id;   // [T', topk]
  float* topk_logit;  // [T', topk]
};

}  // namespace unmask
