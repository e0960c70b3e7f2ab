// Parameters and entry point of rope_append (kernels/rope_append.cpp). Strides are in elements.
#pragma once
#include <stdint.h>

#include "cpu/isa.h"

namespace unmask::cpu {

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

  // Floats of scratch that one call of the kernel needs: cos, sin, and two rows for elements that are not dense.
  int64_t scratch_floats() const { return 2 * freqs + 2 * dim; }
};

}  // namespace unmask::cpu

// Tokens [begin, end).
UNMASK_DECLARE_KERNEL(void, rope_append_tokens, const RopeParams& p, int64_t begin, int64_t end, float* scratch)
