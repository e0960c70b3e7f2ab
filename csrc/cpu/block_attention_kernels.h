// Parameters and entry points of block_attention (kernels/block_attention.cpp). Strides are in elements.
#pragma once
#include <stdint.h>

#include "cpu/isa.h"

namespace unmask::cpu {

constexpr int64_t kAttentionSplit =
    2048;  // keys per partial result; fixed, so that bits depend on neither threads nor batch

struct AttentionParams {
  const void *q, *k, *v;  // [T, Hq, D], [R, Hkv, S, D]
  void* out;              // [T, Hq, D] dense
  float* lse;             // [T, Hq] dense
  int64_t q_stride[3], k_stride[4], v_stride[4];
  int64_t q_heads, group, dim, dtype;  // group = Hq / Hkv; dtype 0 fp32, 1 bf16, 2 fp16
  const int64_t* q_end;                // [T] or null
  int64_t q_end_stride;
  int64_t mask_stride[2], mask_width;  // token, key
  float scale;                         // of the scores, times log2(e): the softmax works in powers of two
};

// One batch entry: its query tokens and the segments of its cache row.
struct AttentionEntry {
  int64_t q_begin, q_count, row, keys;
  const int64_t* seg;  // [segments][2] = (start, length)
  int64_t segments, seg_stride, seg_field_stride;
  const uint8_t* mask;  // [Qmax][W] of this entry, or null
};

// One unit of work: packed rows [row_begin, row_end) of one kv head over the splits [split_begin, split_end). Packed row r is query
// token r / group and query head head * group + r % group.
struct AttentionItem {
  int64_t entry, head, row_begin, row_end, split_begin, split_end;
  float* partial;  // where to leave the one split's unnormalised result; null: finish and write out and lse
};

}  // namespace unmask::cpu

// Floats of scratch that an item of `rows` packed rows needs, and floats of one partial result.
UNMASK_DECLARE_KERNEL(int64_t, block_attention_scratch, const AttentionParams& p, int64_t rows)
UNMASK_DECLARE_KERNEL(int64_t, block_attention_partial, const AttentionParams& p, int64_t rows)
UNMASK_DECLARE_KERNEL(void, block_attention_item, const AttentionParams& p, const AttentionEntry& e,
                      const AttentionItem& it, float* scratch)
// Merges `count` partial results (they lie `partial_floats` apart, from it.partial on) in order and writes out and lse.
UNMASK_DECLARE_KERNEL(void, block_attention_merge, const AttentionParams& p, const AttentionEntry& e,
                      const AttentionItem& it, int64_t count)
