// kl_stats on CUDA: checks (the CPU's own), output, two launches. No host sync; CUDA graphs can capture the call. Device code: kl_stats.cuh.
#include "common/kl_stats_args.h"
#include "common/register.h"
#include "cuda/common/stream.h"
#include "cuda/kl_stats.cuh"
#include "cuda/logit_stats_outputs.h"

namespace unmask::cuda {
namespace {

bool can_load_dense(const void* rows, const int64_t* stride, FloatType type) {
  const int64_t size = type == FloatType::f32 ? 4 : 2;
  return stride[1] == 1 && reinterpret_cast<uintptr_t>(rows) % 16 == 0 && stride[0] * size % 16 == 0;
}

Tensor kl_stats(const Tensor& logits, const Tensor& previous, const OptTensor& rows, const OptTensor& previous_rows,
                const Tensor& lse, const Tensor& previous_lse) {
  const Checker check("kl_stats", logits);
  KlJob job{};
  job.in = read_kl_inputs(check, logits, previous, rows, previous_rows, lse, previous_lse);
  const Launch launch(check.op, logits);
  job.entries = lse.size(0);
  job.chunks = (job.in.vocab + kStatsChunk - 1) / kStatsChunk;
  Tensor out = empty(logits, {job.entries}, ScalarType::Float);
  if (job.entries == 0) return out;
  job.dense = can_load_dense(job.in.logits, job.in.stride, job.in.type);
  job.previous_dense = can_load_dense(job.in.previous, job.in.previous_stride, job.in.type);
  const Tensor parts = empty(logits, {job.entries * job.chunks}, ScalarType::Float);
  job.parts = data<float>(parts);
  job.out = data<float>(out);
  const auto blocks = static_cast<unsigned>((job.entries * job.chunks + kWarpsPerBlock - 1) / kWarpsPerBlock);
  switch (job.in.type) {
    case FloatType::f32: kl_chunks<FloatType::f32><<<blocks, kWarpsPerBlock * 32, 0, launch.stream>>>(job); break;
    case FloatType::bf16: kl_chunks<FloatType::bf16><<<blocks, kWarpsPerBlock * 32, 0, launch.stream>>>(job); break;
    case FloatType::f16: kl_chunks<FloatType::f16><<<blocks, kWarpsPerBlock * 32, 0, launch.stream>>>(job); break;
  }
  launch.check();
  kl_finish<<<static_cast<unsigned>((job.entries + 127) / 128), 128, 0, launch.stream>>>(job);
  launch.check();
  return out;
}

}  // namespace
}  // namespace unmask::cuda

UNMASK_IMPL(CUDA, kl_stats, &unmask::cuda::kl_stats)
