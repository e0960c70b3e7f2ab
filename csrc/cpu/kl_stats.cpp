// kl_stats on the CPU: checks and the split of the work. All chunks of all entries run in parallel and are added in order afterwards, so
// the bits depend on nothing else.
#include <memory>

#include "common/kl_stats_args.h"
#include "common/register.h"
#include "cpu/alloc.h"
#include "cpu/kl_stats_kernels.h"
#include "cpu/parallel.h"

namespace unmask::cpu {
namespace {

constexpr int64_t kSerialChunks = 4;  // below it a second thread costs more than it brings

Tensor kl_stats(const Tensor& logits, const Tensor& previous, const std::optional<Tensor>& rows,
                const std::optional<Tensor>& previous_rows, const Tensor& lse, const Tensor& previous_lse) {
  const Checker check("kl_stats", logits);
  const KlInputs a = read_kl_inputs(check, logits, previous, rows, previous_rows, lse, previous_lse);
  const int64_t entries = lse.size(0), chunks = (a.vocab + kStatsChunk - 1) / kStatsChunk, work = entries * chunks;
  Tensor out = empty<1>({entries}, ScalarType::Float);
  auto* kl = static_cast<float*>(out.mutable_data_ptr());
  const auto chunk_of = UNMASK_KERNEL(kl_chunk);
  std::unique_ptr<float[]> parts(new float[static_cast<size_t>(work)]);
  parallel_for(work, kSerialChunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t e = i / chunks;
      parts[i] = a.exists(e) ? chunk_of(a, e, i % chunks) : 0.0f;
    }
  });
  for (int64_t e = 0; e < entries; ++e) {
    double sum = 0.0;
    for (int64_t c = 0; c < chunks; ++c) sum += static_cast<double>(parts[e * chunks + c]);
    kl[e] = a.exists(e) ? static_cast<float>(sum) : a.without(e);
  }
  return out;
}

}  // namespace
}  // namespace unmask::cpu

UNMASK_IMPL(CPU, kl_stats, &unmask::cpu::kl_stats)
