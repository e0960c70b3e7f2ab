// Arguments of rope_append as plain pointers, the same on every backend. Strides are in elements.
#pragma once
#include <stdint.h>

#include "common/philox.h"  // UNMASK_HD
#include "common/status.h"

namespace unmask {

struct RopeParams {
  const void *q, *k, *v;  // [T, heads, D]
  void *out, *k_cache, *v_cache;  // [T, Hq, D] dense; [R, Hkv, S, D]
  const int64_t *row, *pos, *slot, *v_slot;  // [T]; v_slot may equal slot
  const void *q_weight, *k_weight;  // [D] dense, or null
  const float* inv_freq;            // [F] dense
  int32_t* status;                  // [T] or null; bits are added
  const uint8_t *k_lost, *v_lost;   // [T] or null: 1 where a later token writes the same slot
  int64_t tokens, q_heads, kv_heads, dim, freqs, rows, slots;
  int64_t q_stride[3], k_stride[3], v_stride[3];  // token, head, element
  int64_t k_cache_stride[4], v_cache_stride[4];   // row, head, slot, element
  int64_t row_stride, pos_stride, slot_stride, v_slot_stride, status_stride;
  int64_t dtype;  // 0 fp32, 1 bf16, 2 fp16
  float eps;

  // Floats of scratch that one call of the CPU kernel needs: cos, sin, and two rows for elements that are not dense.
  int64_t scratch_floats() const { return 2 * freqs + 2 * dim; }
};

// Where one token goes.
struct RopeTarget {
  int64_t row, pos, slot, v_slot;
  int32_t fault;  // bits of a token that may not be processed
  UNMASK_HD bool live() const { return row != -1 && fault == 0; }
};

UNMASK_HD RopeTarget rope_target(const RopeParams& p, int64_t t) {
  RopeTarget a{p.row[t * p.row_stride], p.pos[t * p.pos_stride], p.slot[t * p.slot_stride],
               p.v_slot[t * p.v_slot_stride], kStatusOk};
  if (a.row == -1) return a;
  if (a.row < 0 || a.row >= p.rows) a.fault = kStatusBadRow;
  else if (a.slot < -1 || a.slot >= p.slots || a.v_slot < -1 || a.v_slot >= p.slots || a.pos < 0)
    a.fault = kStatusBadSlot;
  return a;
}

}  // namespace unmask
