// filtered_stats on CUDA: checks (the CPU's own), outputs, launches. No host sync, and no memory besides torch tensors, so CUDA graphs can
// capture the call. Device code: filtered_stats.cuh.
#include <algorithm>

#include "common/filtered_stats_args.h"
#include "common/register.h"
#include "cuda/common/stream.h"
#include "cuda/filtered_stats.cuh"
#include "cuda/logit_stats_outputs.h"

namespace unmask::cuda {
namespace {

constexpr int64_t kCopyFloats = int64_t{1} << 24;  // 64 MiB of copied rows at a time, unless one row alone needs more

template <FloatType kType>
void launch_rows(const FilterJob& job, const StatsOutputs& out, const Launch& launch) {
  filter_rows<kType>
      <<<static_cast<unsigned>(job.entries), kFilterThreads, sizeof(FilterShared), launch.stream>>>(job, out);
  launch.check();
}

Outputs filtered_stats(const Tensor& logits, const OptTensor& rows, const OptTensor& forbid, const OptTensor& suppress,
                       const OptTensor& bias_ids, const OptTensor& bias, double temperature, double top_p,
                       int64_t top_k, bool top_k_first, const OptTensor& seed, const OptTensor& step,
                       const OptTensor& pos) {
  const Checker check("filtered_stats", logits);
  const StatsRows which = read_stats_rows(check, logits, rows);
  const int64_t entries = which.entries, vocab = logits.size(1);
  const OptTensor no_ids;
  const StatsArguments args{forbid, suppress, bias_ids, bias, no_ids, 0, temperature, seed, step, pos};
  FilterJob job{};
  job.in = read_stats_inputs(check, logits, args, entries, 0, vocab);
  job.filters = read_filters(check, top_p, top_k, top_k_first, temperature, vocab);
  const Launch launch(check.op, logits);
  StatsOutputs f;
  Outputs out = new_outputs(logits, entries, 0, 0, &f);
  if (entries == 0) return out;
  job.forbid = id_set(forbid);
  job.suppress = id_set(suppress);
  job.rows = which.rows;
  job.rows_stride = which.stride;
  job.n_rows = which.n_rows;
  const int64_t at_once = std::clamp<int64_t>(kCopyFloats / vocab, 1, entries);
  const Tensor copies = empty(logits, {at_once * vocab}, ScalarType::Float);
  job.copies = data<float>(copies);
  for (job.entry_begin = 0; job.entry_begin < entries; job.entry_begin += at_once) {
    job.entries = std::min(at_once, entries - job.entry_begin);
    switch (job.in.type) {
      case FloatType::f32: launch_rows<FloatType::f32>(job, f, launch); break;
      case FloatType::bf16: launch_rows<FloatType::bf16>(job, f, launch); break;
      case FloatType::f16: launch_rows<FloatType::f16>(job, f, launch); break;
    }
  }
  return out;
}

}  // namespace
}  // namespace unmask::cuda

UNMASK_IMPL(CUDA, filtered_stats, &unmask::cuda::filtered_stats)
