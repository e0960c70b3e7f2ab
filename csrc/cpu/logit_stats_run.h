// How the ops that reduce logits run: inputs read once, chunks and rows split over threads, outputs made.
// With few rows the chunks of a row run in parallel and fold left to right afterwards; with many rows each thread folds whole rows.
// Same chunks, same order, same bits.
#pragma once
#include <cstdint>
#include <memory>
#include <tuple>

#include "common/id_list.h"
#include "common/logit_stats_args.h"
#include "cpu/alloc.h"
#include "cpu/logit_stats_kernels.h"
#include "cpu/parallel.h"

namespace unmask::cpu {

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

constexpr int64_t kSerialIds = 32768;  // below this many logits in all, a second thread costs more than it brings

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

struct Prepared {
  StatsArgs args{};
  IdList forbid, suppress;
};

inline void prepare(const Checker& check, const Tensor& logits, const StatsArguments& in, int64_t entries,
                    int64_t offset, int64_t vocab, Prepared* p) {
  StatsArgs& a = p->args;
  static_cast<StatsInputs&>(a) = read_stats_inputs(check, logits, in, entries, offset, vocab);
  p->forbid.read(in.forbid, vocab, &a.list_status);
  p->suppress.read(in.suppress, vocab, &a.list_status);
  a.forbid = p->forbid.ids;
  a.n_forbid = p->forbid.n;
  a.suppress = p->suppress.ids;
  a.n_suppress = p->suppress.n;
}

inline int64_t chunks_of(int64_t ids) { return (ids + kStatsChunk - 1) / kStatsChunk; }

// Calls one(i, fold) for every i < n; fold(row, state) folds all ids of that row into *state, with what the arguments say of entry
// entry_of(i). Rows run in parallel when there are enough of them, else the chunks of all rows row_of(i) do, first, into states of their own.
template <class Entry, class Row, class One>
void for_each_entry(const StatsArgs& a, int64_t n, const Entry& entry_of, const Row& row_of, const One& one) {
  const auto fold = UNMASK_KERNEL(stats_fold);
  const int64_t chunks = chunks_of(a.count);
  const bool serial = n * a.count <= kSerialIds;
  if (serial || chunks <= 1 || n >= 8 * num_threads() || num_threads() == 1) {
    parallel_for(n, serial ? n : 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        one(i, [&](int64_t row, StatsState* st) { fold(a, entry_of(i), row, 0, chunks, st); });
    });
    return;
  }
  const auto merge = UNMASK_KERNEL(stats_merge);
  std::unique_ptr<StatsState[]> parts(new StatsState[static_cast<size_t>(n * chunks)]);
  parallel_for(n * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t i = p / chunks, row = row_of(i);
      reset_state(&parts[p], a.kept);
      if (row >= 0) fold(a, entry_of(i), row, p % chunks, p % chunks + 1, &parts[p]);
    }
  });
  for (int64_t i = 0; i < n; ++i) {
    one(i, [&](int64_t, StatsState* st) {
      for (int64_t c = 0; c < chunks; ++c) merge(st, &parts[i * chunks + c]);
    });
  }
}

inline Outputs new_outputs(int64_t entries, int64_t n_ids, int64_t topk, StatsOutputs* f) {
  *f = {topk, n_ids, nullptr, nullptr, nullptr};
  Outputs out{empty<2>({entries, f->id_width()}, ScalarType::Long),
              empty<2>({entries, f->value_width()}, ScalarType::Float), empty<1>({entries}, ScalarType::Int)};
  f->ids = static_cast<int64_t*>(std::get<0>(out).mutable_data_ptr());
  f->values = static_cast<float*>(std::get<1>(out).mutable_data_ptr());
  f->status = static_cast<int32_t*>(std::get<2>(out).mutable_data_ptr());
  return out;
}

}  // namespace unmask::cpu
