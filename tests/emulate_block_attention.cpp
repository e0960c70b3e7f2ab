// The CUDA kernels of block_attention on the CPU (emulate_warp.h, emulate_tensor_core.h) and their plan, behind C functions that
// tests/test_cuda_emulated_attention.py and tests/test_cuda_plan.py call by ctypes.
#include "emulate_warp.h"

#include "emulate_tensor_core.h"

#include "emulate_hopper.h"

#include <limits>

#include "cuda/block_attention_mma.cuh"
#include "cuda/block_attention_plain.cuh"
#include "cuda/block_attention_wgmma.cuh"

using namespace unmask;
using namespace unmask::cuda;

namespace {

template <FloatType kType, int kDim>
void tiles(const AttentionJob& j, const AttentionPlan& p) {
  const auto run = [&](const auto& kernel) {
    emulate(p.blocks, kAttentionWarps, kernel, p.shared_bytes, p.cluster ? static_cast<int>(p.splits) : 1);
  };
  if (p.wgmma) {
    const auto map = [&](const void* data, const int64_t* stride) {
      return TensorMap{static_cast<const char*>(data),
                       4,
                       64,
                       {j.dim, j.slots, j.kv_heads, j.rows},
                       {stride[2] * 2, stride[1] * 2, stride[0] * 2}};
    };
    const WgmmaJob w{map(j.k, j.k_stride), map(j.v, j.v_stride), j};
    return run([&] { attention_wgmma<kType, kDim>(w); });
  }
  if (p.row_warps == 1) run([&] { attention_tiles<kType, kDim, 1>(j); });
  else if (p.row_warps == 2) run([&] { attention_tiles<kType, kDim, 2>(j); });
  else run([&] { attention_tiles<kType, kDim, 4>(j); });
}

template <FloatType kType>
void typed(const AttentionJob& j, const AttentionPlan& p) {
  if (!p.tensor_cores) return emulate(p.blocks, kAttentionWarps, [&] { attention_rows<kType>(j); }, p.shared_bytes);
  if constexpr (kType != FloatType::f32) {
    if (p.dim == 64) tiles<kType, 64>(j, p);
    else tiles<kType, 128>(j, p);
  }
}

}  // namespace

extern "C" {

// numbers: the fields of AttentionShape, then of AttentionDevice; out: those of AttentionPlan.
void attention_plan(const int64_t* n, int64_t* out) {
  const AttentionPlan p =
      plan_attention({n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7] != 0, n[8] != 0, n[9] != 0, n[10] != 0},
                     {n[11], n[12], n[13], n[14] != 0, n[15] != 0});
  const int64_t fields[] = {p.tensor_cores, p.wgmma,        p.dim,         p.row_warps,     p.row_tile,
                            p.stages,       p.shared_bytes, p.blocks_each, p.splits,        p.min_split_keys,
                            p.tiles,        p.blocks,       p.cluster,     p.partial_floats};
  std::copy(std::begin(fields), std::end(fields), out);
}
int64_t attention_split_keys(int64_t keys, int64_t splits, int64_t least) { return split_keys(keys, splits, least); }

// pointers: q, k_cache, v_cache, out, lse, cu_q, kv_row, seg, q_end, mask, status
// numbers: T, Hq, Hkv, D, R, S, B, G, Qmax, W; strides of q (3), k_cache (4), v_cache (4), cu_q, kv_row, seg (3), q_end, mask (3), status;
//          type (0 fp32, 1 bf16, 2 fp16); the 14 fields of the plan; when asynchronous work is done: 0 as late as allowed, 1 at once, and the last warp runs ahead, 2 copies at once, products late
int emulated_block_attention(void** at, const int64_t* n, float scale) {
  AttentionJob j{};
  j.q = at[0], j.k = at[1], j.v = at[2], j.out = at[3], j.lse = static_cast<float*>(at[4]);
  const auto int64s = [&](int i) { return static_cast<const int64_t*>(at[i]); };
  j.tokens = n[0], j.q_heads = n[1], j.kv_heads = n[2], j.dim = n[3], j.rows = n[4], j.slots = n[5], j.batch = n[6],
  j.segments = n[7];
  j.q_max = n[8], j.mask_width = n[9], j.group = j.q_heads / j.kv_heads;
  n += 10;
  std::copy_n(n, 3, j.q_stride), std::copy_n(n + 3, 4, j.k_stride), std::copy_n(n + 7, 4, j.v_stride);
  j.cu_q = {int64s(5), n[11]}, j.kv_row = {int64s(6), n[12]}, j.seg = int64s(7);
  std::copy_n(n + 13, 3, j.seg_stride);
  j.q_end = {int64s(8), n[16]}, j.mask = static_cast<const uint8_t*>(at[9]);
  std::copy_n(n + 17, 3, j.mask_stride);
  j.status = {static_cast<int32_t*>(at[10]), n[20]};
  j.scale = scale;
  const int64_t type = n[21];
  n += 22;
  const AttentionPlan p{n[0] != 0,
                        n[1] != 0,
                        static_cast<int>(n[2]),
                        static_cast<int>(n[3]),
                        n[4],
                        n[5],
                        n[6],
                        n[7],
                        n[8],
                        n[9],
                        n[10],
                        n[11],
                        n[12] != 0,
                        n[13]};
  Block::now().eager_copies = n[14] != 0;
  Block::now().eager_products = Block::now().last_warp_first = n[14] == 1;
  j.cluster = p.cluster;
  j.row_tile = p.row_tile, j.splits = p.splits, j.min_split_keys = p.min_split_keys, j.stages = p.stages;
  std::vector<float> partial(static_cast<size_t>(p.partial_floats) + 4, std::numeric_limits<float>::quiet_NaN());
  std::vector<uint32_t> tickets(static_cast<size_t>(p.blocks / p.splits));
  j.partial = partial.data() + (16 - reinterpret_cast<uintptr_t>(partial.data()) % 16) % 16 / 4,
  j.tickets = tickets.data();
  return guarded([&] {
    if (type == 0) typed<FloatType::f32>(j, p);
    else if (type == 1) typed<FloatType::bf16>(j, p);
    else typed<FloatType::f16>(j, p);
  });
}
}
