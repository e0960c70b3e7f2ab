// filtered_stats on CUDA, device side: one block of 512 threads an entry. Definitions of order, mass and cut: common/filtered_stats.h.
//
//   copy     the row to a workspace in fp32, biased, suppressed ids at -inf: every later pass reads dense fp32 that lies in L2
//   maximum  and one a thread: the k-th largest of those is under the k-th largest logit
//   sum      of e^((x - M) / T) over the row, for top-p
//   search   the cut by counts, then by masses: histograms of integers in shared memory (filtered_stats_shared.cuh), no sort. Ids below the
//            floor that filtered_stats.h gives touch no bin, so a peaked row makes few additions
//   kept     sums over the kept ids; then forbidden ids go to -inf, and the best two and the noise are taken
// Passes over the workspace: 2 and 3 a filter, at most 10. A thread takes every 512th id; fp32 sums are grouped by thread, then warp, in
// a fixed order, so that an entry's bits depend on nothing but its row. Bytes from DRAM: V x sizeof(dtype) read and 4 V written.
#pragma once
#include <cfloat>

#include "cuda/filtered_stats_shared.cuh"
#include "cuda/logit_stats.cuh"

namespace unmask::cuda {

struct FilterJob {
  StatsInputs in;
  Filters filters;
  IdSet forbid, suppress;
  const int64_t* rows;  // nullptr: entry e reads row e
  int64_t rows_stride, n_rows;
  int64_t entry_begin, entries;  // one block each
  float* copies;  // [entries, V]
};

struct FilterBlock {
  const FilterJob& job;
  FilterShared* s;
  int64_t entry;
  float* x;  // this entry's copy
  float m = neg_inf();

  UNMASK_DEVICE int64_t vocab() const { return job.in.vocab; }

  // f(id, logit) for the ids of this thread, rising.
  template <class F>
  UNMASK_DEVICE void each(const F& f) const {
    for (int64_t i = thread_in_block(); i < vocab(); i += kFilterThreads) f(static_cast<int32_t>(i), x[i]);
  }

  // Sets `v` at the ids of a list; returns status bits.
  UNMASK_DEVICE int32_t set_listed(const IdSet& set) const {
    int32_t status = kStatusOk;
    for (int64_t i = thread_in_block(); i < set.n; i += kFilterThreads) {
      const int64_t id = set.ids[i * set.stride];
      if (id >= vocab()) status = kStatusBadId;
      else if (id >= 0) x[id] = neg_inf();
    }
    return status;
  }

  template <FloatType kType>
  UNMASK_DEVICE int32_t copy_row(int64_t row) const {
    const auto* from = static_cast<const typename Element<kType>::Bits*>(job.in.logits) + row * job.in.row_stride;
    for (int64_t i = thread_in_block(); i < vocab(); i += kFilterThreads)
      x[i] = Element<kType>::value(from[i * job.in.col_stride]);
    block_sync();
    int32_t status = kStatusOk;
    if (thread_in_block() == 0) {
      for (int64_t j = 0; j < job.in.n_bias; ++j) {  // in list order: a repeated id adds up
        const int64_t id = bias_id(job.in, entry, j);
        if (id >= vocab()) status = kStatusBadId;
        else if (id >= 0) x[id] = x[id] + bias_value(job.in, entry, j);
      }
    }
    block_sync();
    status |= set_listed(job.suppress);
    for (int64_t i = thread_in_block(); i < job.forbid.n; i += kFilterThreads)
      status |= job.forbid.ids[i * job.forbid.stride] >= vocab() ? kStatusBadId : kStatusOk;
    block_sync();
    return static_cast<int32_t>(block_max_u32(static_cast<uint32_t>(status), s));  // one bit is in use
  }

  // Sets m and the threads' own maxima; true if there is a NaN.
  UNMASK_DEVICE bool find_maximum() {
    float own = neg_inf();
    bool nan = false;
    each([&](int32_t, float v) {
      nan = nan || v != v;
      own = max_drop_nan(v, own);
    });
    s->top_of_thread[thread_in_block()] = own;
    m = of_ordered(block_max_u32(ordered(own), s));
    return block_max_u32(nan ? 1u : 0u, s) != 0;
  }

  UNMASK_DEVICE float mass(float v) const { return exp_neg(tempered(v, m, job.filters.scale)); }

  // Over the ids that the cut keeps; 64 terms at a time, as equal ones would round the same way.
  UNMASK_DEVICE SumExp sum_kept(const Cut& cut) const {
    float n = 0.0f, r = 0.0f, t = 0.0f, r64 = 0.0f, t64 = 0.0f;
    int terms = 0;
    each([&](int32_t id, float v) {
      if (!cut.keeps(v, id)) return;
      if (v == m) {
        n = n + 1.0f;
        return;
      }
      float d = tempered(v, m, job.filters.scale);
      d = kExpMin > d ? kExpMin : d;
      const float e = exp_neg(d);
      r64 = r64 + e;
      t64 = UNMASK_FMA(d, e, t64);
      if (++terms % 64 != 0) return;
      r = r + r64;
      t = t + t64;
      r64 = t64 = 0.0f;
    });
    n = block_sum(n, s);
    r = block_sum(r + r64, s);
    t = block_sum(t + t64, s);
    return {m, (n - 1.0f) + r, t};
  }

  // At or below the k-th largest logit.
  UNMASK_DEVICE float count_floor(int64_t k) const {
    if (k > kFilterThreads) return -FLT_MAX;
    const float own = s->top_of_thread[thread_in_block()];
    int before = 0;
    for (int j = 0; j < kFilterThreads; ++j) {
      const float other = s->top_of_thread[j];
      before += other > own || (other == own && j < thread_in_block());
    }
    if (before == k - 1) s->floor = own;
    block_sync();
    const float floor = s->floor;
    block_sync();
    return floor > -FLT_MAX ? floor : -FLT_MAX;
  }

  UNMASK_DEVICE Cut cut_by_count() const {
    const Found f = search(
        logit_key(count_floor(job.filters.top_k)), logit_key(m), static_cast<uint64_t>(job.filters.top_k - 1), s,
        [&](const auto& add) { each([&](int32_t, float v) { add(logit_key(v), [] { return uint64_t{1}; }); }); });
    if (!f.any) return no_cut();  // fewer than k ids above -inf
    return {logit_of_key(f.key), INT32_MAX};
  }

  // Among the ids that `head` keeps. floor: no id below it is kept.
  UNMASK_DEVICE Cut cut_by_mass(const Cut& head, float floor, uint64_t limit) const {
    const float unit = mass_unit(job.filters.mass_bits);
    const Found f = search(logit_key(floor), logit_key(m), limit, s, [&](const auto& add) {
      each([&](int32_t id, float v) {
        if (head.keeps(v, id)) add(logit_key(v), [&] { return mass_of(mass(v), unit); });
      });
    });
    if (!f.any) return no_cut();
    // All ids here have one mass: as many as fit stay, and the one that crosses. Its place among them is a search over ids.
    const float at = logit_of_key(f.key);
    const uint64_t own = mass_of(mass(at), unit);
    const Found last =
        search(0xFFFFFFFFu - static_cast<uint32_t>(vocab()), 0xFFFFFFFFu, f.left / own, s, [&](const auto& add) {
          each([&](int32_t id, float v) {
            if (v == at && head.keeps(v, id)) add(0xFFFFFFFFu - static_cast<uint32_t>(id), [] { return uint64_t{1}; });
          });
        });
    return {at, static_cast<int32_t>(0xFFFFFFFFu - last.key)};
  }

  UNMASK_DEVICE Cut find_cut() const {
    const Filters& f = job.filters;
    Cut cut = no_cut();
    if (f.by_count()) cut = cut_by_count();
    if (!f.by_mass()) return cut;
    const float unit = mass_unit(f.mass_bits);
    if (f.by_count() && f.top_k_first) {
      uint64_t own = 0;
      each([&](int32_t id, float v) {
        if (cut.keeps(v, id)) own += mass_of(mass(v), unit);
      });
      const auto total = static_cast<double>(block_sum_u64(own, s));
      const float floor = cut.x > -FLT_MAX ? cut.x : -FLT_MAX;
      return tighter(cut, cut_by_mass(cut, floor, mass_limit(f.top_p, total)));
    }
    const SumExp all = sum_kept(no_cut());
    const double total = (1.0 + static_cast<double>(all.r)) * static_cast<double>(unit);
    float floor = lightest_kept(f, m, all.total(), vocab());
    floor = floor > -FLT_MAX ? floor : -FLT_MAX;
    return tighter(cut, cut_by_mass(no_cut(), floor, mass_limit(f.top_p, total)));
  }

  // The best two and the winner of the noise among the ids that the cut keeps, in every thread.
  UNMASK_DEVICE void best_kept(const Cut& cut, bool sampled, Top2* top, Sample* sample) const {
    Top2 own = {no_cand(), no_cand()};
    Sample mine = {neg_inf(), -1, neg_inf()};
    const StatsInputs& in = job.in;
    NoiseKey key = {0, 0, 0};
    if (sampled) {
      key = {static_cast<uint64_t>(in.seed[entry * in.seed_stride]),
             static_cast<uint32_t>(in.step[entry * in.step_stride]),
             static_cast<uint32_t>(in.pos[entry * in.pos_stride])};
    }
    each([&](int32_t id, float v) {
      if (!cut.keeps(v, id)) return;
      const Cand c = {v, id};
      if (beats(c, own.a)) own = {c, own.a};
      else if (beats(c, own.b)) own.b = c;
      if (!sampled || !(noisy_score(in.temperature, kGumbelMax, v) > mine.score)) return;
      const float score =
          noisy_score(in.temperature, gumbel_of_id(key.seed, key.step, key.pos, static_cast<uint32_t>(id)), v);
      if (score > mine.score) mine = {score, id, v};
    });
    for (int mask = 16; mask > 0; mask >>= 1) {
      const Top2 other = {{warp_get_xor(own.a.v, mask), warp_get_xor(own.a.id, mask)},
                          {warp_get_xor(own.b.v, mask), warp_get_xor(own.b.id, mask)}};
      own = merge_top2(own, other);
    }
    mine = warp_best(mine);
    if (lane_id() == 0) {
      s->top[warp_in_block()][0] = own.a;
      s->top[warp_in_block()][1] = own.b;
      s->sample[warp_in_block()] = mine;
    }
    block_sync();
    *top = {s->top[0][0], s->top[0][1]};
    *sample = s->sample[0];
    for (int w = 1; w < kFilterWarps; ++w) {
      *top = merge_top2(*top, {s->top[w][0], s->top[w][1]});
      if (beats(s->sample[w], *sample)) *sample = s->sample[w];
    }
    block_sync();
  }

  template <FloatType kType>
  UNMASK_DEVICE EntryStats run(int64_t row) {
    int32_t status = copy_row<kType>(row);
    if (find_maximum()) status |= kStatusNaN;
    else if (m == neg_inf()) status |= kStatusAllInf;
    if (is_invalid(status)) return invalid_stats(status);
    const Cut cut = find_cut();
    SumExp sum = sum_kept(cut);
    set_listed(job.forbid);
    block_sync();
    Top2 top;
    Sample sample;
    const bool sampled = job.in.temperature > 0.0f;
    best_kept(cut, sampled, &top, &sample);
    if (top.a.id < 0) {  // only forbidden ids were kept: the best candidate is, too
      best_kept(no_cut(), false, &top, &sample);
      if (top.a.id < 0) return invalid_stats(status | kStatusAllInf);
      sum = with_id(sum, top.a.v, job.filters.scale);
      top.b = no_cand();
      sample = {top.a.v, top.a.id, top.a.v};
    } else if (!sampled) {
      sample = {top.a.v, top.a.id, top.a.v};
    }
    return finish_filtered(job.filters, sum, sample, top.a, top.b, status);
  }
};

template <FloatType kType>
UNMASK_KERNEL_BOUNDS(kFilterThreads, 1)
filter_rows(const FilterJob job, const StatsOutputs out) {
  const int64_t entry = job.entry_begin + block_index();
  const int64_t row = job.rows != nullptr ? job.rows[entry * job.rows_stride] : entry;
  EntryStats result = row == -1 ? none_stats() : invalid_stats(kStatusBadRow);
  if (row >= 0 && row < job.n_rows) {
    FilterBlock block{job, reinterpret_cast<FilterShared*>(dynamic_shared()), entry,
                      job.copies + block_index() * job.in.vocab};
    result = block.run<kType>(row);
  }
  if (thread_in_block() == 0) out.write(entry, result);
}

}  // namespace unmask::cuda
