// head_stats: logit_stats of hidden @ head^T for the rows asked for, over vocabulary tiles packed by oneDNN; logits are never stored.
//
// Per tile of the vocabulary: one product for all rows that exist, then each row's logits are folded into its state while they are in the
// cache. Same chunks, same order and same bits as logit_stats on the concatenated logits. Rows are gathered and padded to a multiple of
// kPackedRows, so that a row has the same bits in any batch. One op instead of seven per step: at 4 to 32 rows the calls around the products
// cost as much as the reductions (see decoder_layer.cpp).
#include <cstring>
#include <vector>

#include "common/dense.h"
#include "common/register.h"
#include "cpu/logit_stats_run.h"
#include "cpu/packed_linear.h"

namespace unmask::cpu {
namespace {

// Ids of the vocabulary, from tiles that all but the last end at a multiple of kStatsChunk.
int64_t check_tiles(const Checker& check, const std::vector<Tensor>& tiles, ScalarType dtype, int64_t width) {
  int64_t vocab = 0;
  for (const Tensor& tile : tiles) {
    if (vocab % kStatsChunk != 0)
      fail_must_be(check.op, "tiles", "of a multiple of 4096 ids each, but for the last",
                   std::to_string(vocab) + " ids before one");
    const int64_t ids = check_packed(check, tile, "a tile", dtype, "[ids, d]", -1, width).out;
    check.require(ids >= 1, "the ids of a tile", "at least 1", ids);
    vocab += ids;
  }
  check.require(vocab >= 1 && vocab <= INT32_MAX, "V, the ids of all tiles", "1 to 2147483647", vocab);
  return vocab;
}

// The rows of hidden (dense rows) that exist, in the order of their entries, then rows of zeros up to a multiple of kPackedRows.
Tensor gathered(const Tensor& hidden, const std::vector<int64_t>& rows) {
  const int64_t n = static_cast<int64_t>(rows.size()), padded = (n + kPackedRows - 1) / kPackedRows * kPackedRows;
  const int64_t element = element_bytes(hidden), bytes = hidden.size(1) * element, step = hidden.stride(0) * element;
  Tensor x = empty_as<2>({padded, hidden.size(1)}, hidden);
  const char* from = static_cast<const char*>(hidden.const_data_ptr());
  char* to = static_cast<char*>(x.mutable_data_ptr());
  for (int64_t i = 0; i < n; ++i)
    std::memcpy(to + i * bytes, from + rows[static_cast<size_t>(i)] * step, static_cast<size_t>(bytes));
  std::memset(to + n * bytes, 0, static_cast<size_t>((padded - n) * bytes));
  return x;
}

Outputs head_stats(const Tensor& hidden, const std::vector<Tensor>& tiles, const OptTensor& rows_arg,
                   const OptTensor& forbid, const OptTensor& suppress, const OptTensor& bias_ids, const OptTensor& bias,
                   const OptTensor& ids, int64_t topk, double temperature, const OptTensor& seed, const OptTensor& step,
                   const OptTensor& pos) {
  const Checker check("head_stats", hidden);
  const ScalarType dtype = hidden.scalar_type();
  if (check.cuda || (dtype != ScalarType::Float && dtype != ScalarType::BFloat16))
    fail_must_be(check.op, "hidden", "float32 or bfloat16 on the CPU", dtype_name(dtype));
  check.shape(hidden, "hidden", "[M, d]", {-1, -1});
  const int64_t vocab = check_tiles(check, tiles, dtype, hidden.size(1));
  const StatsRows rows = read_stats_rows_of(check, hidden.size(0), rows_arg);
  Prepared p;
  prepare(check, hidden, {forbid, suppress, bias_ids, bias, ids, topk, temperature, seed, step, pos}, rows.entries, 0,
          vocab, &p);
  StatsArgs& a = p.args;

  std::vector<int64_t> entry, row;  // of each row that exists
  for (int64_t e = 0; e < rows.entries; ++e) {
    const int64_t r = rows.rows != nullptr ? rows.rows[e * rows.stride] : e;
    if (r >= 0 && r < rows.n_rows) entry.push_back(e), row.push_back(r);
  }
  StatsOutputs f;
  Outputs out = new_outputs(rows.entries, a.n_ids, topk, &f);
  const int64_t n = static_cast<int64_t>(entry.size());
  std::vector<StatsState> state(static_cast<size_t>(rows.entries));
  for (StatsState& st : state) reset_state(&st, a.kept);
  for (int64_t e : entry) {
    state[static_cast<size_t>(e)].status = a.list_status;
    state[static_cast<size_t>(e)].next = static_cast<int32_t>(vocab);
    for (int64_t i = 0; i < a.n_ids; ++i) f.at_ids(e)[2 * i + 1] = neg_inf();
  }

  if (n > 0) {
    const Tensor x = gathered(dense(hidden), row);
    const auto at_ids = UNMASK_KERNEL(stats_at_ids);
    for (const Tensor& tile : tiles) {
      const Tensor y = packed_linear(x, tile);
      a.logits = y.const_data_ptr(), a.count = y.size(1), a.row_stride = y.size(1), a.col_stride = 1;
      for_each_entry(
          a, n, [&](int64_t i) { return entry[static_cast<size_t>(i)]; }, [](int64_t i) { return i; },
          [&](int64_t i, const auto& fold) {
            const int64_t e = entry[static_cast<size_t>(i)];
            StatsState& st = state[static_cast<size_t>(e)];
            fold(i, &st);
            if (a.n_ids > 0) st.status |= at_ids(a, e, i, f.at_ids(e) + 1, 2);
          });
      a.offset += a.count;
    }
  }
  const auto outputs = UNMASK_KERNEL(stats_outputs);
  for (int64_t e = 0; e < rows.entries; ++e) {
    StatsState& st = state[static_cast<size_t>(e)];
    if (st.next == 0 && rows.rows[e * rows.stride] != -1) st.next = 1, st.status = kStatusBadRow;
    outputs(f, e, &st);
  }
  return out;
}

}  // namespace
}  // namespace unmask::cpu

// Packed tiles bring a dispatch key of their own; with ordinary ones the call must still reach the checks.
UNMASK_IMPL(MkldnnCPU, head_stats, &unmask::cpu::head_stats)
UNMASK_IMPL(CPU, head_stats, &unmask::cpu::head_stats)
