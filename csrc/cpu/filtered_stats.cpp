// filtered_stats on the CPU: checks, outputs, memory; rows run in parallel. The arithmetic is in kernels/filtered_stats.cpp.
#include <memory>
#include <tuple>

#include "common/filtered_stats_args.h"
#include "common/id_list.h"
#include "common/register.h"
#include "cpu/alloc.h"
#include "cpu/filtered_stats_kernels.h"
#include "cpu/parallel.h"

namespace unmask::cpu {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

// 16 to 20 bytes an id; pages that a row does not need are never touched.
class Memory {
 public:
  Memory(int64_t vocab, bool copies) {
    const int64_t chunks = (vocab + kStatsChunk - 1) / kStatsChunk, list = vocab + kFilterPad;
    words_.reset(new uint32_t[static_cast<size_t>(5 * list + chunks * 64 + (copies ? chunks * kStatsChunk : 0))]);
    copied_.reset(new unsigned char[static_cast<size_t>(chunks)]);
    uint32_t* next = words_.get();
    const auto take = [&](int64_t n) {
      uint32_t* p = next;
      next += n;
      return p;
    };
    scratch_.x = reinterpret_cast<float*>(take(list));
    scratch_.id = reinterpret_cast<int32_t*>(take(list));
    scratch_.e = reinterpret_cast<float*>(take(list));
    scratch_.key = take(list);
    scratch_.place = reinterpret_cast<int32_t*>(take(list));
    scratch_.lanes = reinterpret_cast<float*>(take(chunks * 64));
    scratch_.row = copies ? reinterpret_cast<float*>(take(chunks * kStatsChunk)) : nullptr;
    scratch_.copied = copied_.get();
  }
  const FilterScratch& scratch() const { return scratch_; }

 private:
  std::unique_ptr<uint32_t[]> words_;
  std::unique_ptr<unsigned char[]> copied_;
  FilterScratch scratch_{};
};

Outputs filtered_stats(const Tensor& logits, const OptTensor& rows_arg, const OptTensor& forbid,
                       const OptTensor& suppress, const OptTensor& bias_ids, const OptTensor& bias, double temperature,
                       double top_p, int64_t top_k, bool top_k_first, const OptTensor& seed, const OptTensor& step,
                       const OptTensor& pos) {
  const Checker check("filtered_stats", logits);
  const StatsRows rows = read_stats_rows(check, logits, rows_arg);
  const int64_t entries = rows.entries, vocab = logits.size(1);
  const OptTensor no_ids;
  const StatsArguments in{forbid, suppress, bias_ids, bias, no_ids, 0, temperature, seed, step, pos};
  FilteredArgs a{};
  static_cast<StatsInputs&>(a) = read_stats_inputs(check, logits, in, entries, 0, vocab);
  a.filters = read_filters(check, top_p, top_k, top_k_first, temperature, vocab);
  IdList forbidden, suppressed;
  forbidden.read(forbid, vocab, &a.list_status);
  suppressed.read(suppress, vocab, &a.list_status);
  a.forbid = forbidden.ids;
  a.n_forbid = forbidden.n;
  a.suppress = suppressed.ids;
  a.n_suppress = suppressed.n;

  StatsOutputs f{0, 0, nullptr, nullptr, nullptr};
  Outputs out{empty<2>({entries, f.id_width()}, ScalarType::Long),
              empty<2>({entries, f.value_width()}, ScalarType::Float), empty<1>({entries}, ScalarType::Int)};
  f.ids = static_cast<int64_t*>(std::get<0>(out).mutable_data_ptr());
  f.values = static_cast<float*>(std::get<1>(out).mutable_data_ptr());
  f.status = static_cast<int32_t*>(std::get<2>(out).mutable_data_ptr());
  const auto one = UNMASK_KERNEL(filtered_row);
  const bool copies = a.n_suppress > 0 || a.n_bias > 0 || a.col_stride != 1;
  parallel_for(entries, 1, [&](int64_t begin, int64_t end) {
    const Memory memory(vocab, copies);
    for (int64_t e = begin; e < end; ++e) {
      const int64_t row = rows.rows != nullptr ? rows.rows[e * rows.stride] : e;
      if (row >= 0 && row < rows.n_rows) f.write(e, one(a, e, row, memory.scratch()));
      else f.write(e, row == -1 ? none_stats() : invalid_stats(kStatusBadRow));
    }
  });
  return out;
}

}  // namespace
}  // namespace unmask::cpu

UNMASK_IMPL(CPU, filtered_stats, &unmask::cpu::filtered_stats)
