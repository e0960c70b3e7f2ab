// The CUDA kernels of verify_greedy and verify_ratio on the CPU (emulate_warp.h), behind C functions that
// tests/test_cuda_emulated_verify.py calls by ctypes.
#include "emulate_warp.h"

#include <limits>
#include <vector>

#include "cuda/verify_greedy.cuh"
#include "cuda/verify_ratio.cuh"
#include "emulate_arguments.h"

using namespace unmask;
using namespace unmask::cuda;

namespace {

int64_t blocks_of(int64_t warps) { return (warps + kWarpsPerBlock - 1) / kWarpsPerBlock; }

// As launch_all of verify_ratio.cu.
template <FloatType kType>
void launch_all(const RatioJob& job) {
  const auto run = [](int64_t warps, const auto& kernel) { emulate(blocks_of(warps), kWarpsPerBlock, kernel); };
  if (job.in.positions > 0) {
    run(job.in.positions * 2 * job.chunks, [&] { ratio_sums<kType>(job); });
    run(job.in.positions, [&] { ratio_judge<kType>(job); });
  }
  run(job.in.spans, [&] { ratio_walk(job); });
  if (!job.in.resample || job.in.positions == 0) return;
  run(job.in.spans * job.chunks, [&] { ratio_draws<kType>(job); });
  run(job.in.spans, [&] { ratio_next(job); });
}

}  // namespace

extern "C" {

// pointers: node, after, parent, count, status, last, length
// numbers: strides of node (3), after (3), parent (2), count, status, then B, N, W, mask_id, subset
int emulated_verify_greedy(void** p, const int64_t* n) {
  return guarded([&] {
    GreedyInputs in{};
    in.node = static_cast<const int64_t*>(p[0]), in.after = static_cast<const int64_t*>(p[1]);
    in.parent = static_cast<const int64_t*>(p[2]);
    for (int d = 0; d < 3; ++d) in.node_stride[d] = n[d], in.after_stride[d] = n[3 + d];
    for (int d = 0; d < 2; ++d) in.parent_stride[d] = n[6 + d];
    in.count = strided<const int64_t>(p[3], n[8]), in.status = strided<int32_t>(p[4], n[9]);
    in.rows = n[10], in.nodes = n[11], in.width = n[12], in.mask_id = n[13], in.subset = n[14] != 0;
    in.last = static_cast<int64_t*>(p[5]), in.length = static_cast<int64_t*>(p[6]);
    emulate((in.rows + kGreedyWarps - 1) / kGreedyWarps, kGreedyWarps, [&] { verify_rows(in); });
  });
}

// pointers: p_logits, q_logits, p_row, q_row, token, cu, seed, step, pos, uniforms, forbid, accepted, next, log_ratio, status
// numbers: type, strides of p_logits (2) and q_logits (2), rows of both, V, N, B, F, strides of p_row .. forbid (9), uniforms are float64,
//          resample, 16-byte loads of p_logits, of q_logits
int emulated_verify_ratio(void** p, const int64_t* n, double temper, float scale) {
  return guarded([&] {
    RatioJob job{};
    RatioInputs& in = job.in;
    in.type = static_cast<FloatType>(n[0]);
    const int64_t* s = n + 11;
    for (int side = 0; side < 2; ++side)
      in.side[side] = {
          p[side], {n[1 + 2 * side], n[2 + 2 * side]}, n[5 + side], strided<const int64_t>(p[2 + side], s[side])};
    in.vocab = n[7], in.positions = n[8], in.spans = n[9];
    in.token = strided<const int64_t>(p[4], s[2]), in.cu = strided<const int64_t>(p[5], s[3]);
    in.seed = strided<const int64_t>(p[6], s[4]), in.step = strided<const int64_t>(p[7], s[5]);
    in.pos = strided<const int64_t>(p[8], s[6]);
    in.uniforms = {p[9], s[7], n[20] != 0};
    job.forbid = {static_cast<const int64_t*>(p[10]), n[10], s[8]};
    in.temper = temper, in.scale = scale, in.resample = n[21] != 0;
    job.dense[0] = n[22] != 0, job.dense[1] = n[23] != 0;
    job.chunks = (in.vocab + kStatsChunk - 1) / kStatsChunk;
    job.out = {static_cast<int64_t*>(p[11]), static_cast<int64_t*>(p[12]), static_cast<float*>(p[13]),
               static_cast<int32_t*>(p[14])};
    const float bad = std::numeric_limits<float>::quiet_NaN();  // no kernel may read what another has not written
    std::vector<SumExp> parts(static_cast<size_t>(in.positions * 2 * job.chunks), SumExp{bad, bad, bad});
    std::vector<SumExp> sums(static_cast<size_t>(in.positions * 2), SumExp{bad, bad, bad});
    std::vector<int32_t> judged(static_cast<size_t>(2 * in.positions), 0x55);
    std::vector<int64_t> rejected(static_cast<size_t>(in.spans), int64_t{1} << 60);
    std::vector<ResidualDraw> draws(static_cast<size_t>(in.spans * job.chunks), ResidualDraw{1e30f, 7, true});
    job.parts = parts.data(), job.sums = sums.data(), job.verdict = judged.data();
    job.bits = judged.data() + in.positions, job.rejected = rejected.data(), job.draws = draws.data();
    switch (in.type) {
      case FloatType::f32: launch_all<FloatType::f32>(job); break;
      case FloatType::bf16: launch_all<FloatType::bf16>(job); break;
      case FloatType::f16: launch_all<FloatType::f16>(job); break;
    }
  });
}
}
