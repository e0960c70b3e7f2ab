// The CUDA kernels of filtered_stats and kl_stats on the CPU (emulate_warp.h), behind C functions that tests/test_cuda_emulated_filtered.py
// calls by ctypes.
#include "emulate_warp.h"

#include <limits>
#include <vector>

#include "cuda/filtered_stats.cuh"
#include "cuda/kl_stats.cuh"

using namespace unmask;
using namespace unmask::cuda;

namespace {

template <FloatType kType>
void rows(const FilterJob& job, const StatsOutputs& out) {
  emulate(job.entries, kFilterWarps, [&] { filter_rows<kType>(job, out); }, sizeof(FilterShared));
}

template <FloatType kType>
void kl(const KlJob& job) {
  emulate((job.entries * job.chunks + kWarpsPerBlock - 1) / kWarpsPerBlock, kWarpsPerBlock,
          [&] { kl_chunks<kType>(job); });
  emulate((job.entries + 127) / 128, 4, [&] { kl_finish(job); });
}

}  // namespace

extern "C" {

// As filtered_stats.cu does, `at_once` entries a launch. scale and mass_bits as read_filters gives them.
int emulated_filtered_stats(const StatsInputs* in, const IdSet* forbid, const IdSet* suppress, const int64_t* which,
                            int64_t stride, int64_t n_rows, int64_t entries, int64_t at_once, double top_p,
                            int64_t top_k, bool top_k_first, const StatsOutputs* out) {
  return guarded([&] {
    FilterJob job{*in, {}, *forbid, *suppress, which, stride, n_rows, 0, 0, nullptr};
    const float t = in->temperature > 0.0f ? in->temperature : 1.0f;
    const double scale = std::min(1.0 / static_cast<double>(t), static_cast<double>(FLT_MAX));
    job.filters = {top_p,
                   top_k > 0 && top_k < in->vocab ? top_k : 0,
                   top_k_first,
                   t,
                   static_cast<float>(scale),
                   mass_bits(in->vocab)};
    std::vector<float> copies(static_cast<size_t>(at_once * in->vocab), std::numeric_limits<float>::quiet_NaN());
    job.copies = copies.data();
    for (; job.entry_begin < entries; job.entry_begin += at_once) {
      job.entries = std::min(at_once, entries - job.entry_begin);
      switch (in->type) {
        case FloatType::f32: rows<FloatType::f32>(job, *out); break;
        case FloatType::bf16: rows<FloatType::bf16>(job, *out); break;
        case FloatType::f16: rows<FloatType::f16>(job, *out); break;
      }
    }
  });
}

// pointers: logits, previous, rows, previous_rows, lse, previous_lse, out
// numbers: type, strides of logits (2) and previous (2), vocab, rows of both, strides of rows, previous_rows, lse, previous_lse, entries,
//          16-byte loads of logits, of previous
int emulated_kl_stats(void** p, const int64_t* n) {
  return guarded([&] {
    KlJob job{};
    KlInputs& in = job.in;
    in.logits = p[0], in.previous = p[1], in.type = static_cast<FloatType>(n[0]);
    for (int d = 0; d < 2; ++d) in.stride[d] = n[1 + d], in.previous_stride[d] = n[3 + d];
    in.vocab = n[5], in.n_rows = n[6], in.n_previous = n[7];
    in.rows = static_cast<const int64_t*>(p[2]), in.previous_rows = static_cast<const int64_t*>(p[3]);
    in.rows_stride = n[8], in.previous_rows_stride = n[9];
    in.lse = static_cast<const float*>(p[4]), in.previous_lse = static_cast<const float*>(p[5]);
    in.lse_stride = n[10], in.previous_lse_stride = n[11];
    job.entries = n[12], job.chunks = (in.vocab + kStatsChunk - 1) / kStatsChunk;
    job.dense = n[13] != 0, job.previous_dense = n[14] != 0;
    std::vector<float> parts(static_cast<size_t>(job.entries * job.chunks), std::numeric_limits<float>::quiet_NaN());
    job.parts = parts.data(), job.out = static_cast<float*>(p[6]);
    switch (in.type) {
      case FloatType::f32: kl<FloatType::f32>(job); break;
      case FloatType::bf16: kl<FloatType::bf16>(job); break;
      case FloatType::f16: kl<FloatType::f16>(job); break;
    }
  });
}
}
