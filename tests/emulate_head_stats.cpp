// The fused LM head of Hopper on the CPU (emulate_warp.h, emulate_hopper.h) and its plan, behind C functions that
// tests/test_cuda_emulated_head.py calls by ctypes.
#include "emulate_warp.h"

#include "emulate_tensor_core.h"

#include "emulate_hopper.h"

#include <limits>

#include "cuda/head_stats.cuh"
#include "cuda/logit_stats_plan.h"

using namespace unmask;
using namespace unmask::cuda;

namespace {

template <FloatType kType, int kTokens>
void scan(const HeadJob& job, const HeadPlan& plan) {
  const auto run = [&](const auto& kernel) { emulate(plan.blocks, kHeadWarps + 1, kernel, plan.shared_bytes); };
  if (job.stats.in.temperature > 0.0f) run([&] { head_scan<kType, kTokens, true>(job); });
  else run([&] { head_scan<kType, kTokens, false>(job); });
}

template <FloatType kType>
void typed(const HeadJob& job, const HeadPlan& plan) {
  if (plan.tokens == 32) scan<kType, 32>(job, plan);
  else scan<kType, 64>(job, plan);
}

}  // namespace

extern "C" {

// out: tokens, units, blocks, stages, stage_bytes, shared_bytes
void head_plan(int64_t entries, int64_t vocab, int64_t multiprocessors, int64_t shared_per_block, int64_t* out) {
  const HeadPlan p = plan_head(entries, vocab, multiprocessors, shared_per_block);
  const int64_t fields[] = {p.tokens, p.units, p.blocks, p.stages, p.stage_bytes, p.shared_bytes};
  std::copy(std::begin(fields), std::end(fields), out);
}
void head_unit_range(int64_t block, int64_t blocks, int64_t units, int64_t* out) {
  const UnitRange r = head_units(block, blocks, units);
  out[0] = r.first, out[1] = r.end;
}

// As launch_head_stats of csrc/cuda/sm90a/head_stats.cu. when: of asynchronous work, as in emulate_block_attention.cpp.
int emulated_head_stats(const StatsJob* stats, const void* hidden, int64_t hidden_stride, const void* weight,
                        int64_t width, int64_t weight_stride, int64_t multiprocessors, int64_t when,
                        const StatsOutputs* out) {
  return guarded([&] {
    Block::now().eager_copies = when != 0;
    Block::now().eager_products = Block::now().last_warp_first = when == 1;
    const int64_t entries = stats->entries;
    const HeadPlan plan = plan_head(entries, stats->in.vocab, multiprocessors, 232448);
    const auto words = [](int64_t n) { return std::vector<uint32_t>(static_cast<size_t>(n), 0x7FC0DEADu); };
    auto sums = words(entries * plan.blocks * kSumWords), best = words(entries * plan.blocks * kGroupWords),
         id_logit = words(entries * stats->in.n_ids + 1), gathered = words(entries * width / 2 + 4);
    HeadJob job{};
    job.stats = *stats;
    job.stats.in.logits = nullptr, job.stats.in.count = stats->in.vocab;
    job.stats.chunks = job.stats.groups = plan.blocks, job.stats.group_chunks = 1, job.stats.tree = true;
    job.stats.sums = reinterpret_cast<SumExp*>(sums.data()), job.stats.best = reinterpret_cast<GroupBest*>(best.data());
    job.stats.id_logit = job.id_logit = reinterpret_cast<float*>(id_logit.data());
    job.width = width, job.units = plan.units, job.stages = static_cast<int>(plan.stages);
    const char* rows = static_cast<const char*>(hidden);
    int64_t rows_stride = hidden_stride;
    if (stats->rows != nullptr) {
      char* to = reinterpret_cast<char*>(gathered.data());
      to += (16 - reinterpret_cast<uintptr_t>(to) % 16) % 16;
      const GatherJob g{rows, to, stats->rows, stats->rows_stride, stats->n_rows, width * 2, hidden_stride * 2};
      emulate(entries, 4, [&] { gather_rows(g); });
      rows = to, rows_stride = width;
    }
    job.weight = {static_cast<const char*>(weight), 2, 64, {width, stats->in.vocab}, {weight_stride * 2}};
    job.hidden = {rows, 2, plan.tokens, {width, entries}, {rows_stride * 2}};
    if (stats->in.type == FloatType::bf16) typed<FloatType::bf16>(job, plan);
    else typed<FloatType::f16>(job, plan);
    emulate((entries + kWarpsPerBlock - 1) / kWarpsPerBlock, kWarpsPerBlock, [&] { head_fold(job.stats, *out); });
  });
}
}
