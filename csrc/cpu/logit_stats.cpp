// logit_stats / stats_tile / stats_finish: checks, output allocation and the split of the work; the arithmetic is in
// kernels/logit_stats.cpp. With few rows the chunks of a row run in parallel and fold left to right afterwards; with
// many rows each thread folds whole rows. Same chunks, same order, same bits.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

#include "common/id_list.h"
#include "common/logit_stats_args.h"
#include "common/register.h"
#include "cpu/alloc.h"
#include "cpu/logit_stats_kernels.h"
#include "cpu/parallel.h"

namespace unmask::cpu {
namespace {

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

void prepare(const Checker& check, const Tensor& logits, const StatsArguments& in, int64_t entries, int64_t offset,
             int64_t vocab, Prepared* p) {
  StatsArgs& a = p->args;
  static_cast<StatsInputs&>(a) = read_stats_inputs(check, logits, in, entries, offset, vocab);
  p->forbid.read(in.forbid, vocab, &a.list_status);
  p->suppress.read(in.suppress, vocab, &a.list_status);
  a.forbid = p->forbid.ids;
  a.n_forbid = p->forbid.n;
  a.suppress = p->suppress.ids;
  a.n_suppress = p->suppress.n;
}

int64_t chunks_of(int64_t ids) { return (ids + kStatsChunk - 1) / kStatsChunk; }

// Calls one(entry, fold) for every entry; fold(row, state) folds all ids of that row into *state. Rows run in parallel
// when there are enough of them, else the chunks of all rows do, first, into states of their own.
template <class Row, class One>
void for_each_entry(const StatsArgs& a, int64_t entries, const Row& row_of, const One& one) {
  const auto fold = UNMASK_KERNEL(stats_fold);
  const int64_t chunks = chunks_of(a.count);
  const bool serial = entries * a.count <= kSerialIds;
  if (serial || chunks <= 1 || entries >= 8 * num_threads() || num_threads() == 1) {
    parallel_for(entries, serial ? entries : 1, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e)
        one(e, [&](int64_t row, StatsState* st) { fold(a, e, row, 0, chunks, st); });
    });
    return;
  }
  const auto merge = UNMASK_KERNEL(stats_merge);
  std::unique_ptr<StatsState[]> parts(new StatsState[static_cast<size_t>(entries * chunks)]);
  parallel_for(entries * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t e = i / chunks, row = row_of(e);
      reset_state(&parts[i], a.kept);
      if (row >= 0) fold(a, e, row, i % chunks, i % chunks + 1, &parts[i]);
    }
  });
  for (int64_t e = 0; e < entries; ++e) {
    one(e, [&](int64_t, StatsState* st) {
      for (int64_t c = 0; c < chunks; ++c) merge(st, &parts[e * chunks + c]);
    });
  }
}

Outputs new_outputs(int64_t entries, int64_t n_ids, int64_t topk, StatsOutputs* f) {
  *f = {topk, n_ids, nullptr, nullptr, nullptr};
  Outputs out{empty<2>({entries, f->id_width()}, ScalarType::Long),
              empty<2>({entries, f->value_width()}, ScalarType::Float), empty<1>({entries}, ScalarType::Int)};
  f->ids = static_cast<int64_t*>(std::get<0>(out).mutable_data_ptr());
  f->values = static_cast<float*>(std::get<1>(out).mutable_data_ptr());
  f->status = static_cast<int32_t*>(std::get<2>(out).mutable_data_ptr());
  return out;
}

Outputs logit_stats(const Tensor& logits, const OptTensor& rows_arg, const OptTensor& forbid, const OptTensor& suppress,
                    const OptTensor& bias_ids, const OptTensor& bias, const OptTensor& ids, int64_t topk,
                    double temperature, const OptTensor& seed, const OptTensor& step, const OptTensor& pos,
                    const OptTensor& null_logits, double guidance) {
  const Checker check("logit_stats", logits);
  const StatsRows rows = read_stats_rows(check, logits, rows_arg);
  const int64_t entries = rows.entries, vocab = logits.size(1);
  Prepared p;
  prepare(check, logits, {forbid, suppress, bias_ids, bias, ids, topk, temperature, seed, step, pos}, entries, 0, vocab,
          &p);
  read_null_logits(check, logits, null_logits, guidance, &p.args);
  const StatsArgs& a = p.args;
  StatsOutputs f;
  Outputs out = new_outputs(entries, a.n_ids, topk, &f);
  const auto at_ids = UNMASK_KERNEL(stats_at_ids);
  const auto outputs = UNMASK_KERNEL(stats_outputs);
  const auto row_of = [&](int64_t e) {
    const int64_t r = rows.rows != nullptr ? rows.rows[e * rows.stride] : e;
    return r >= 0 && r < rows.n_rows ? r : int64_t{-1};
  };
  for_each_entry(a, entries, row_of, [&](int64_t e, const auto& fold) {
    StatsState st;
    reset_state(&st, a.kept);
    const int64_t r = row_of(e);
    if (r >= 0) {
      st.next = static_cast<int32_t>(vocab);
      st.status = a.list_status;
      fold(r, &st);
      float* logit = f.at_ids(e) + 1;
      for (int64_t i = 0; i < a.n_ids; ++i) logit[2 * i] = neg_inf();
      if (a.n_ids > 0) st.status |= at_ids(a, e, r, logit, 2);
    } else if (rows.rows[e * rows.stride] != -1) {
      st.next = 1;
      st.status = kStatusBadRow;
    }
    outputs(f, e, &st);
  });
  return out;
}

// Strided access to the rows of the state tensor.
struct StateRows {
  int32_t* words;
  int64_t stride[2];
  explicit StateRows(const Tensor& t)
      : words(static_cast<int32_t*>(t.mutable_data_ptr())), stride{t.stride(0), t.stride(1)} {}
  StatsState load(int64_t e) const {
    int32_t w[kStateWords];
    for (int64_t i = 0; i < kStateWords; ++i) w[i] = words[e * stride[0] + i * stride[1]];
    StatsState st;
    std::memcpy(&st, w, sizeof st);
    return st;
  }
  void store(int64_t e, const StatsState& st) const {
    int32_t w[kStateWords];
    std::memcpy(w, &st, sizeof st);
    for (int64_t i = 0; i < kStateWords; ++i) words[e * stride[0] + i * stride[1]] = w[i];
  }
};

void stats_tile(const Tensor& logits, Tensor& state, OptTensor id_logit, int64_t offset, int64_t vocab,
                const OptTensor& forbid, const OptTensor& suppress, const OptTensor& bias_ids, const OptTensor& bias,
                const OptTensor& ids, int64_t topk, double temperature, const OptTensor& seed, const OptTensor& step,
                const OptTensor& pos) {
  const Checker check("stats_tile", logits);
  check_stats_tile(check, logits, state, id_logit, offset, vocab);
  const int64_t entries = logits.size(0), count = logits.size(1);
  Prepared p;
  prepare(check, logits, {forbid, suppress, bias_ids, bias, ids, topk, temperature, seed, step, pos}, entries, offset,
          vocab, &p);
  const StatsArgs& a = p.args;
  check_id_logit(check, ids, id_logit, entries, a.n_ids);
  float* logit = nullptr;
  int64_t logit_stride[2] = {0, 0};
  if (id_logit) {
    logit = static_cast<float*>(id_logit->mutable_data_ptr());
    for (int d = 0; d < 2; ++d) logit_stride[d] = id_logit->stride(d);
  }
  const StateRows states(state);
  const auto at_ids = UNMASK_KERNEL(stats_at_ids);
  for_each_entry(
      a, entries, [](int64_t e) { return e; },
      [&](int64_t e, const auto& fold) {
        StatsState st = states.load(e);
        if (st.next == 0) {
          reset_state(&st, a.kept);
          st.status = a.list_status;
          for (int64_t i = 0; i < a.n_ids; ++i) logit[e * logit_stride[0] + i * logit_stride[1]] = neg_inf();
        }
        if (st.next != offset || st.kept != a.kept) {  // tiles out of order, or another topk
          st.status |= kStatusBadSegment;
          st.next = std::max(st.next, 1);
        } else {
          fold(e, &st);
          if (a.n_ids > 0) st.status |= at_ids(a, e, e, logit + e * logit_stride[0], logit_stride[1]);
          st.next = static_cast<int32_t>(offset + count);
        }
        states.store(e, st);
      });
}

Outputs stats_finish(const Tensor& state, const OptTensor& id_logit, int64_t topk) {
  const Checker check("stats_finish", state);
  const int64_t entries = check_stats_finish(check, state, id_logit, topk);
  const int64_t n_ids = id_logit ? id_logit->size(1) : 0;
  StatsOutputs f;
  Outputs out = new_outputs(entries, n_ids, topk, &f);
  const StateRows states(state);
  const auto outputs = UNMASK_KERNEL(stats_outputs);
  for (int64_t e = 0; e < entries; ++e) {
    StatsState st = states.load(e);
    if (st.next != 0 && topk > st.kept) st.status |= kStatusBadSegment;  // the tiles kept fewer
    const float* logit = n_ids > 0 ? data<float>(*id_logit) + e * id_logit->stride(0) : nullptr;
    for (int64_t i = 0; i < n_ids; ++i) f.at_ids(e)[2 * i + 1] = logit[i * id_logit->stride(1)];
    outputs(f, e, &st);
  }
  return out;
}

}  // namespace
}  // namespace unmask::cpu

UNMASK_IMPL(CPU, logit_stats, &unmask::cpu::logit_stats)
UNMASK_IMPL(CPU, stats_tile, &unmask::cpu::stats_tile)
UNMASK_IMPL(CPU, stats_finish, &unmask::cpu::stats_finish)
