// The CUDA kernels of moe_route and moe_combine on the CPU (emulate_warp.h), behind C functions that tests/test_cuda_emulated_moe.py calls
// by ctypes.
#include "emulate_warp.h"

#include "cuda/moe_route.cuh"

using namespace unmask;
using namespace unmask::cuda;

extern "C" {

// pointers: logits, row, bias, expert, weight, place, source, offsets, count
// numbers: logits strides (2), row stride, bias stride, T, E, groups, kept, top_k, multiple, capacity, softmax, renormalise
int emulated_moe_route(void** q, const int64_t* n, float scale) {
  RouteJob job{};
  RouteParams& p = job.p;
  p.logits = static_cast<const float*>(q[0]), p.row = static_cast<const int64_t*>(q[1]);
  p.bias = static_cast<const float*>(q[2]), p.expert = static_cast<int64_t*>(q[3]);
  p.weight = static_cast<float*>(q[4]), p.place = static_cast<int64_t*>(q[5]);
  p.source = static_cast<int64_t*>(q[6]), p.offsets = static_cast<int32_t*>(q[7]);
  job.count = static_cast<int32_t*>(q[8]);
  p.logits_stride[0] = n[0], p.logits_stride[1] = n[1], p.row_stride = n[2], p.bias_stride = n[3];
  p.tokens = n[4], p.experts = n[5], p.groups = n[6], p.kept = n[7], p.top_k = n[8], p.multiple = n[9];
  p.capacity = n[10], p.softmax = n[11] != 0, p.renormalise = n[12] != 0, p.scale = scale;
  return guarded([&] {
    const int64_t blocks = (p.experts + kPairWarps - 1) / kPairWarps;
    emulate(p.tokens, 1, [&] { route_tokens(job); }, route_shared_bytes(p));
    emulate(blocks, kPairWarps, [&] { count_pairs(job); });
    emulate(blocks, kPairWarps, [&] { place_pairs(job); });
  });
}

// pointers: y, place, weight, out; numbers: y row, rows, D, place strides (2), weight strides (2), T, K, type
int emulated_moe_combine(void** q, const int64_t* n, bool aligned) {
  const CombineParams p{q[0],         n[0],
                        n[1],         n[2],
                        n[9],         static_cast<const int64_t*>(q[1]),
                        {n[3], n[4]}, static_cast<const float*>(q[2]),
                        {n[5], n[6]}, n[7],
                        n[8],         q[3]};
  return guarded([&] {
    const int64_t warps = p.tokens * ((p.dim + kWarpRun - 1) / kWarpRun), blocks = (warps + kRowWarps - 1) / kRowWarps;
    emulate(blocks, kRowWarps, [&] {
      if (p.dtype == 0) combine_rows<FloatType::f32>(p, aligned);
      else if (p.dtype == 1) combine_rows<FloatType::bf16>(p, aligned);
      else combine_rows<FloatType::f16>(p, aligned);
    });
  });
}
}
