// verify_ratio on the CPU: checks, outputs and the split of the work. All chunks of all positions are summed in parallel and merged in order; a
// position is judged on its merged sums; each span is walked; then all chunks of all rejected positions are drawn from in parallel.
// Same chunks, same order, same bits at any thread count and in any batch.
#include <memory>
#include <vector>

#include "common/id_list.h"
#include "common/register.h"
#include "common/verify_ratio_args.h"
#include "cpu/alloc.h"
#include "cpu/parallel.h"
#include "cpu/verify_ratio_kernels.h"

namespace unmask::cpu {
namespace {

constexpr int64_t kSerialIds = 32768;  // below this many logits in all, a second thread costs more than it brings

struct Sums { SumExp of[2]; };

// The sums of every position's two rows, and what follows from them.
void judge_positions(const RatioArgs& a, int64_t chunks, const SumExp* parts, Sums* sums, RatioPosition* position) {
  const auto logit = UNMASK_KERNEL(ratio_logit);
  for (int64_t n = 0; n < a.positions; ++n) {
    if (!a.readable(n)) {
      position[n] = judge_unread(a, n);
      continue;
    }
    for (int s = 0; s < 2; ++s) sums[n].of[s] = merge_parts(parts + (2 * n + s) * chunks, chunks, a.scale);
    position[n] = judge(a, n, logit(a, 0, n), sums[n].of[0], logit(a, 1, n), sums[n].of[1]);
  }
}

// Length of the accepted prefix and status to the outputs; the rejected position to draw at, or -1.
int64_t walk_span(const RatioArgs& a, const RatioPosition* position, int64_t span, const RatioOutputs& out) {
  const int64_t begin = a.cu[span], end = a.cu[span + 1];
  const bool fits = begin >= 0 && begin <= end && end <= a.positions;
  int32_t bits = fits ? kStatusOk : kStatusBadSegment;
  int64_t accepted = 0, rejected = -1;
  for (int64_t n = begin; fits && n < end; ++n) {
    if (position[n].verdict == Verdict::inactive) break;
    bits |= position[n].status;
    if (rejected < 0 && position[n].verdict == Verdict::accepted) ++accepted;
    else if (rejected < 0) rejected = n;
  }
  out.accepted[span] = bits == kStatusOk ? accepted : 0;
  out.next[span] = -1;
  out.status[span] = bits | a.list_status;
  return bits == kStatusOk ? rejected : -1;
}

// next of every span in `spans`, whose rejected position is in `at`.
void draw_tokens(const RatioArgs& a, int64_t chunks, const Sums* sums, const std::vector<int64_t>& spans,
                 const std::vector<int64_t>& at, const RatioOutputs& out) {
  const auto draw = UNMASK_KERNEL(ratio_draw);
  const auto work = static_cast<int64_t>(spans.size()) * chunks;
  std::unique_ptr<ResidualDraw[]> parts(new ResidualDraw[static_cast<size_t>(work)]);
  const int64_t grain = 1 + kSerialIds / (a.vocab < kStatsChunk ? a.vocab : kStatsChunk);
  parallel_for(work, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = at[static_cast<size_t>(i / chunks)];
      parts[i] = draw(a, n, i % chunks, sums[n].of);
    }
  });
  for (size_t s = 0; s < spans.size(); ++s) {
    ResidualDraw best = no_draw();
    for (int64_t c = 0; c < chunks; ++c) {
      const ResidualDraw& part = parts[static_cast<int64_t>(s) * chunks + c];
      if (beats(part, best)) best = part;
    }
    out.next[spans[s]] = best.id;
  }
}

RatioTensors verify_ratio(const Checker& check, const RatioArguments& in) {
  RatioArgs a{};
  static_cast<RatioInputs&>(a) = read_ratio_inputs(check, in);
  IdList forbidden;
  forbidden.read(in.forbid, a.vocab, &a.list_status);
  a.forbid = forbidden.ids;
  a.n_forbid = forbidden.n;
  Tensor accepted = empty<1>({a.spans}, ScalarType::Long), next = empty<1>({a.spans}, ScalarType::Long);
  Tensor log_ratio = empty<1>({a.positions}, ScalarType::Float), status = empty<1>({a.spans}, ScalarType::Int);
  const RatioOutputs out{
      static_cast<int64_t*>(accepted.mutable_data_ptr()), static_cast<int64_t*>(next.mutable_data_ptr()),
      static_cast<float*>(log_ratio.mutable_data_ptr()), static_cast<int32_t*>(status.mutable_data_ptr())};

  const int64_t chunks = (a.vocab + kStatsChunk - 1) / kStatsChunk, work = a.positions * 2 * chunks;
  const auto sum = UNMASK_KERNEL(ratio_sum);
  std::unique_ptr<SumExp[]> parts(new SumExp[static_cast<size_t>(work)]);
  const int64_t grain = 1 + kSerialIds / (a.vocab < kStatsChunk ? a.vocab : kStatsChunk);
  parallel_for(work, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / (2 * chunks);
      if (a.readable(n)) parts[i] = sum(a, static_cast<int>(i / chunks % 2), n, i % chunks);
    }
  });

  const auto positions = static_cast<size_t>(a.positions);
  std::unique_ptr<Sums[]> sums(new Sums[positions]);
  std::unique_ptr<RatioPosition[]> position(new RatioPosition[positions]);
  judge_positions(a, chunks, parts.get(), sums.get(), position.get());
  for (int64_t n = 0; n < a.positions; ++n) out.log_ratio[n] = position[n].log_ratio;
  std::vector<int64_t> spans, at;
  for (int64_t b = 0; b < a.spans; ++b) {
    const int64_t rejected = walk_span(a, position.get(), b, out);
    if (rejected < 0 || !a.resample) continue;
    spans.push_back(b);
    at.push_back(rejected);
  }
  if (!spans.empty()) draw_tokens(a, chunks, sums.get(), spans, at, out);
  return {std::move(accepted), std::move(next), std::move(log_ratio), std::move(status)};
}

}  // namespace
}  // namespace unmask::cpu

UNMASK_IMPL(CPU, verify_ratio, &unmask::verify_ratio_op<&unmask::cpu::verify_ratio>)
