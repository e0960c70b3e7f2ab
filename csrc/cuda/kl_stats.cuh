// kl_stats on CUDA, device side. kl_chunks gives one warp a chunk of 4,096 ids of one entry: a lane takes 8 neighbours of both rows at a time,
// 16 bytes a load where rows are dense. kl_finish adds an entry's chunks left to right in fp64. Bytes: 2 V x sizeof(dtype) an entry, once.
#pragma once
#include "common/kl_stats.h"
#include "cuda/logit_stats.cuh"

namespace unmask::cuda {

struct KlJob {
  KlInputs in;
  int64_t entries, chunks;
  bool dense, previous_dense;  // 16-byte loads are possible
  float* parts;  // [entries, chunks]
  float* out;  // [entries]
};

template <FloatType kType>
UNMASK_KERNEL_BOUNDS(kWarpsPerBlock * 32, 4)
kl_chunks(const KlJob job) {
  const int64_t index = block_index() * kWarpsPerBlock + warp_in_block();
  const int64_t entry = index / job.chunks, first = index % job.chunks * kStatsChunk;
  const KlInputs& in = job.in;
  if (entry >= job.entries || !in.exists(entry)) return;
  using Bits = typename Element<kType>::Bits;
  const auto* x = static_cast<const Bits*>(in.logits) + in.row(entry) * in.stride[0];
  const auto* y = static_cast<const Bits*>(in.previous) + in.previous_row(entry) * in.previous_stride[0];
  const float lse = in.lse[entry * in.lse_stride], previous_lse = in.previous_lse[entry * in.previous_lse_stride];
  float sum[2] = {0.0f, 0.0f};
  const int64_t end = first + kStatsChunk < in.vocab ? first + kStatsChunk : in.vocab;
  for (int64_t i = first + lane_id() * kRun; i < end; i += 32 * kRun) {  // behind the last id x = -inf, and p = 0
    const Run<kType> a = load_run<kType>(x, in.stride[1], job.dense, i, in.vocab);
    const Run<kType> b = load_run<kType>(y, in.previous_stride[1], job.previous_dense, i, in.vocab);
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      const float log_p = a.get(k) - lse, log_q = b.get(k) - previous_lse;
      const float ratio = max_keep_nan(log_p, kLogFloor) - max_keep_nan(log_q, kLogFloor);
      sum[k % 2] = UNMASK_FMA(exp_neg(log_p), ratio, sum[k % 2]);
    }
  }
  const float all = warp_sum(sum[0] + sum[1]);
  if (lane_id() == 0) job.parts[index] = all;
}

UNMASK_KERNEL_BOUNDS(128, 1) kl_finish(const KlJob job) {
  const int64_t entry = block_index() * 128 + warp_in_block() * 32 + lane_id();
  if (entry >= job.entries) return;
  double sum = 0.0;
  if (job.in.exists(entry)) {
    for (int64_t c = 0; c < job.chunks; ++c) sum = sum + static_cast<double>(job.parts[entry * job.chunks + c]);
  }
  job.out[entry] = job.in.exists(entry) ? static_cast<float>(sum) : job.in.without(entry);
}

}  // namespace unmask::cuda
