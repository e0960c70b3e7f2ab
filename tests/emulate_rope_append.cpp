// The CUDA kernels of rope_append on the CPU (emulate_warp.h), behind a C function that tests/test_cuda_emulated_rope.py calls by ctypes.
#include "emulate_warp.h"

#include <vector>

#include "cuda/rope_append.cuh"

using namespace unmask;
using namespace unmask::cuda;

namespace {

template <FloatType kType>
void heads(const RopeParams& p) {
  const int64_t groups = (p.q_heads + 2 * p.kv_heads + kHeads - 1) / kHeads, warps = p.tokens * groups;
  emulate((warps + kRopeWarps - 1) / kRopeWarps, kRopeWarps, [&] { rope_heads<kType>(p); });
}

}  // namespace

extern "C" {

// pointers: q, k, v, out, k_cache, v_cache, row, pos, slot, v_slot, q_weight, k_weight, inv_freq, status
// numbers: tokens, q_heads, kv_heads, dim, freqs, rows, slots; strides of q, k, v (3 each), of the caches (4 each), of row, pos, slot,
//          v_slot, status; type (0 fp32, 1 bf16, 2 fp16); look for lost writes in a launch of its own
int emulated_rope_append(void** at, const int64_t* n, float eps) {
  RopeParams p{};
  p.q = at[0], p.k = at[1], p.v = at[2], p.out = at[3], p.k_cache = at[4], p.v_cache = at[5];
  p.row = static_cast<const int64_t*>(at[6]), p.pos = static_cast<const int64_t*>(at[7]);
  p.slot = static_cast<const int64_t*>(at[8]), p.v_slot = static_cast<const int64_t*>(at[9]);
  p.q_weight = at[10], p.k_weight = at[11], p.inv_freq = static_cast<const float*>(at[12]);
  p.status = static_cast<int32_t*>(at[13]);
  p.tokens = n[0], p.q_heads = n[1], p.kv_heads = n[2], p.dim = n[3], p.freqs = n[4], p.rows = n[5], p.slots = n[6];
  n += 7;
  for (int64_t* strides : {p.q_stride, p.k_stride, p.v_stride})
    for (int i = 0; i < 3; ++i) strides[i] = *n++;
  for (int64_t* strides : {p.k_cache_stride, p.v_cache_stride})
    for (int i = 0; i < 4; ++i) strides[i] = *n++;
  p.row_stride = n[0], p.pos_stride = n[1], p.slot_stride = n[2], p.v_slot_stride = n[3], p.status_stride = n[4];
  p.dtype = n[5], p.eps = eps;
  std::vector<uint8_t> lost(static_cast<size_t>(2 * p.tokens), 9);
  return guarded([&] {
    if (n[6] != 0) {
      emulate((p.tokens + kRopeWarps - 1) / kRopeWarps, kRopeWarps,
              [&] { rope_find_lost(p, lost.data(), lost.data() + p.tokens); });
      p.k_lost = lost.data(), p.v_lost = lost.data() + p.tokens;
    }
    if (p.dtype == 0) heads<FloatType::f32>(p);
    else if (p.dtype == 1) heads<FloatType::bf16>(p);
    else heads<FloatType::f16>(p);
  });
}
}
