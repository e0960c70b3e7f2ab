// logit_stats / stats_tile / stats_finish: checks and what they do per entry; the split of the work is in logit_stats_run.h, the arithmetic
// in kernels/logit_stats.cpp.
#include <algorithm>
#include <cstring>

#include "common/register.h"
#include "cpu/logit_stats_run.h"

namespace unmask::cpu {
namespace {

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
  for_each_entry(
      a, entries, [](int64_t e) { return e; }, row_of,
      [&](int64_t e, const auto& fold) {
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
  const auto same = [](int64_t e) { return e; };
  for_each_entry(a, entries, same, same, [&](int64_t e, const auto& fold) {
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
