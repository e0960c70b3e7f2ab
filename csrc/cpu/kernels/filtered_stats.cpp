// filtered_stats on the CPU: one row. Definitions of order, mass and cut: common/filtered_stats.h.
//
//   read     chunk maxima and sums of e^((x - m) / T), as logit_stats reads a row (once from DRAM; the row then lies in L2)
//   collect  ids that no filter can remove for sure: at or above the k-th largest lane maximum (each lane maximum is another id, so at least
//            k ids are) and at or above the lightest id that top-p could keep
//   cut      among those, by counts and by masses (filtered_stats_select.h)
//   keep     the ids above the cut: sums, noise, the best two
// At 126,464 ids and top_k = 50 some 60 ids are collected; at top_p = 0.95 about three times as many as are kept. Where that looks to be more
// than V / 16, filtered_stats_head.h has another way.
#include "cpu/filtered_stats_kernels.h"

#include <float.h>

#include "cpu/filtered_stats_head.h"
#include "cpu/filtered_stats_noise.h"
#include "cpu/filtered_stats_select.h"
#include "cpu/filtered_stats_sums.h"

namespace unmask::cpu::UNMASK_ISA_NS {
namespace {

constexpr int kChunk = static_cast<int>(kStatsChunk);

template <class T> struct Copied { using Type = float; };
template <> struct Copied<bf16> { using Type = EvenOdd; };  // the lanes of the chunk in place

template <class T>
struct FilterRow {
  const FilteredArgs& a;
  const FilterScratch& s;
  const T* x;
  int64_t chunks;

  int size(int64_t c) const { return static_cast<int>(a.count - c * kChunk < kChunk ? a.count - c * kChunk : kChunk); }

  // Chunks with suppressed or biased ids, or of a row with a column stride, go to scratch in fp32. Returns status bits.
  int32_t copy_changed(int64_t entry) const {
    int32_t status = a.list_status;
    for (int64_t c = 0; c < chunks; ++c) s.copied[c] = a.col_stride != 1;
    for (int64_t j = 0; j < a.n_suppress; ++j) s.copied[a.suppress[j] / kChunk] = 1;
    const auto bias_id = [&](int64_t j) { return a.bias_ids[entry * a.bias_ids_stride[0] + j * a.bias_ids_stride[1]]; };
    for (int64_t j = 0; j < a.n_bias; ++j) {
      const int64_t id = bias_id(j);
      if (id >= a.vocab) status |= kStatusBadId;
      else if (id >= 0) s.copied[id / kChunk] = 1;
    }
    for (int64_t c = 0; c < chunks; ++c) {
      if (s.copied[c] == 0) continue;
      const int64_t base = c * kChunk;
      for (int i = 0; i < size(c); ++i) s.row[base + i] = to_float(x[(base + i) * a.col_stride]);
    }
    for (int64_t j = 0; j < a.n_bias; ++j) {  // in list order: a repeated id adds up
      const int64_t id = bias_id(j);
      if (id >= 0 && id < a.vocab) s.row[id] = s.row[id] + a.bias[entry * a.bias_stride[0] + j * a.bias_stride[1]];
    }
    for (int64_t j = 0; j < a.n_suppress; ++j) s.row[a.suppress[j]] = neg_inf();
    return status;
  }

  // Lane maxima to scratch; the sum over the row, NaN if there is a NaN.
  SumExp read() const {
    SumExp all = empty_sum();
    bool nan = false;
    for (int64_t c = 0; c < chunks; ++c) {
      float* lanes = s.lanes + c * kStep;
      const int n = size(c);
      SumExp part;
      if (s.copied[c] != 0) {
        const float* copy = s.row + c * kChunk;
        chunk_max(copy, n, lanes);
        part =
            tempered_chunk(reinterpret_cast<const typename Copied<T>::Type*>(copy), n, max_of(lanes), a.filters.scale);
      } else {
        chunk_max(x + c * kChunk, n, lanes);
        part = tempered_chunk(x + c * kChunk, n, max_of(lanes), a.filters.scale);
      }
      nan = nan || part.r != part.r;
      all = merge_tempered(all, part, a.filters.scale);
    }
    if (nan) all.r = quiet_nan();
    return all;
  }

  template <bool kRare>
  int64_t collect_between(float floor, float ceiling) const {
    int64_t n = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      const int32_t base = static_cast<int32_t>(c * kChunk);
      if (!(max_of(s.lanes + c * kStep) >= floor)) continue;
      n = s.copied[c] != 0 ? collect<kRare>(s.row + base, size(c), base, floor, ceiling, s.x, s.id, n)
                           : collect<kRare>(x + base, size(c), base, floor, ceiling, s.x, s.id, n);
    }
    return n;
  }

  // Every kSampleEvery-th id to s.x, padded with +inf; returns how many.
  int64_t sample() const {
    int64_t n = 0;
    for (int64_t c = 0; c < chunks; ++c) {
      for (int64_t i = c * kChunk + c % kSampleEvery; i < c * kChunk + size(c); i += kSampleEvery)
        s.x[n++] = s.copied[c] != 0 ? s.row[i] : to_float(x[i]);
    }
    for (int64_t i = n; i < n + kPair; ++i) s.x[i] = pos_inf();
    return n;
  }

  // {m, sum of e, sum of d e} over the ids above `high`.
  SumExp head_above(float high, float m) const {
    SumExp head = {m, 0.0f, 0.0f};
    for (int64_t c = 0; c < chunks; ++c) {
      if (!(max_of(s.lanes + c * kStep) > high)) continue;
      const float* copy = s.row + c * kChunk;
      const SumExp part = s.copied[c] != 0 ? head_sums(reinterpret_cast<const typename Copied<T>::Type*>(copy), size(c),
                                                       high, m, a.filters.scale)
                                           : head_sums(x + c * kChunk, size(c), high, m, a.filters.scale);
      head.r += part.r;
      head.t += part.t;
    }
    return head;
  }
};

UNMASK_INLINE float larger(float a, float b) { return b > a ? b : a; }

// S in units of mass.
UNMASK_INLINE double row_mass(const Filters& f, const SumExp& all) {
  return (1.0 + static_cast<double>(all.r)) * static_cast<double>(mass_unit(f.mass_bits));
}

// The k-th largest lane maximum; -inf if there are fewer.
UNMASK_INLINE float lane_floor(const FilterScratch& s, int64_t lanes, int64_t k) {
  return cut_after(s.lanes, nullptr, lanes, CountWeight{}, static_cast<uint64_t>(k - 1), s.key, s.place).x;
}

// Applies the filters to the n collected ids, in place; returns how many are left. `all`: the sum over the row.
int64_t apply(const FilteredArgs& a, const FilterScratch& s, int64_t n, const SumExp& all) {
  const Filters& f = a.filters;
  Cut cut = no_cut();
  if (f.by_count()) cut = cut_after(s.x, s.id, n, CountWeight{}, static_cast<uint64_t>(f.top_k - 1), s.key, s.place);
  if (!f.by_mass()) return keep(cut, s.x, s.id, n);
  const float unit = mass_unit(f.mass_bits);
  const bool of_the_rest = f.by_count() && f.top_k_first;
  if (of_the_rest) n = keep(cut, s.x, s.id, n);
  tempered_masses(s.x, n, all.m, f.scale, s.e);
  double total = row_mass(f, all);
  if (of_the_rest) {
    uint64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) kept += mass_of(s.e[i], unit);
    total = static_cast<double>(kept);
  }
  const Cut heavy = cut_after(s.x, s.id, n, MassWeight{s.e, unit}, mass_limit(f.top_p, total), s.key, s.place);
  cut = tighter(cut, heavy);
  return keep(cut, s.x, s.id, n);
}

// The winner of temperature * noise + logit among (x, id)[0..n); ids at -inf cannot win.
Sample sample_of(const FilteredArgs& a, int64_t entry, const float* x, const int32_t* id, int64_t n) {
  NoiseKey key;
  set_key(&key, static_cast<uint64_t>(a.seed[entry * a.seed_stride]),
          static_cast<uint32_t>(a.pos[entry * a.pos_stride]), static_cast<uint32_t>(a.step[entry * a.step_stride]));
  Sample best = {neg_inf(), -1, neg_inf()};
  alignas(64) uint32_t words[kListed];
  float g[kListed];
  for (int64_t i = 0; i < n; i += kListed) {  // what lies beyond n is computed and not looked at
    philox_words_of(key, id + i, words);
    for (int l = 0; l < kListed; ++l) g[l] = gumbel_from_bits(words[l]);
    for (int l = 0; l < kListed && i + l < n; ++l) {
      const float score = noisy_score(a.temperature, g[l], x[i + l]);
      if (score > best.score) best = {score, id[i + l], x[i + l]};
    }
  }
  return best;
}

// Forbidden ids among (x, id)[0..n) get -inf. Both lists rise.
UNMASK_INLINE void forbid_listed(const FilteredArgs& a, float* x, const int32_t* id, int64_t n) {
  for (int64_t j = 0; j < a.n_forbid; ++j) {
    int64_t low = 0, high = n;
    while (low < high) {
      const int64_t mid = (low + high) / 2;
      if (id[mid] < a.forbid[j]) low = mid + 1;
      else high = mid;
    }
    if (low < n && id[low] == a.forbid[j]) x[low] = neg_inf();
  }
}

UNMASK_INLINE void best_two(const float* x, const int32_t* id, int64_t n, Cand* top) {
  top[0] = top[1] = no_cand();
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] > top[1].v) insert_cand(top, 2, {x[i], id[i]});
  }
}

// The best candidate of the whole row; id < 0: there is none.
Cand best_candidate(const FilteredArgs& a, int64_t entry, int64_t row, int64_t chunks) {
  StatsArgs greedy = a;
  greedy.temperature = 0.0f;
  StatsState st;
  reset_state(&st, greedy.kept);
  stats_fold(greedy, entry, row, 0, chunks, &st);
  return st.top[0];
}

template <class T>
EntryStats unfiltered(const FilterRow<T>& r, int64_t entry, int64_t row) {
  StatsState st;
  reset_state(&st, r.a.kept);
  st.next = static_cast<int32_t>(r.a.vocab);
  st.status = r.a.list_status;
  stats_fold(r.a, entry, row, 0, r.chunks, &st);
  const EntryStats plain = finish_stats(st);
  if (r.a.filters.scale == 1.0f || is_invalid(plain.status)) return plain;
  r.copy_changed(entry);
  return finish_filtered(r.a.filters, r.read(), st.sample, st.top[0], st.top[1], plain.status);
}

// ---- many kept ids ------------------------------------------------------------------------------------------------
struct Many {
  Cut cut;
  SumExp sum;
  bool sparse;  // few enough for lists after all
};

// Whether more than V / kListShare ids seem to lie at or above the floor; the sample is then in s.x. (It decides how sums are grouped, so it must
// not look at lane maxima: which ids share a lane depends on where the chunk lies.)
template <class T>
bool many_from(const FilterRow<T>& r, float floor, int64_t* sampled) {
  if (r.a.vocab <= kHeadVocab || floor == pos_inf()) return false;
  *sampled = r.sample();
  return count_from(r.s.x, *sampled, floor) > *sampled / kListShare;
}

// A floor for top-k that is likely, not sure, to have k ids at or above it.
template <class T>
float likely_floor(const FilterRow<T>& r, float m) {
  if (r.a.vocab <= kHeadVocab) return -FLT_MAX;
  const int64_t sampled = r.sample(), k = r.a.filters.top_k * sampled / r.a.vocab;
  return guess_floor(r.s.x, sampled, k + k / 8 + 16, m);
}

// The cut of top-p and the sum over what it keeps; false if the sample misled.
template <class T>
bool keep_many(const FilterRow<T>& r, const SumExp& all, float floor, int64_t sampled, Many* many) {
  const FilterScratch& s = r.s;
  const Filters& f = r.a.filters;
  tempered_masses(s.x, sampled, all.m, f.scale, s.e);
  const float share = static_cast<float>(sampled) / static_cast<float>(r.a.vocab);
  const float tail = static_cast<float>(1.0 - f.top_p) * all.total() * share;
  const Bracket bracket = guess_bracket(s.x, s.e, sampled, tail, floor, all.m);
  if (!(bracket.high < all.m)) return false;
  many->sparse = count_from(s.x, sampled, bracket.high) < sampled / kListShare;

  const SumExp head = r.head_above(bracket.high, all.m);
  if (head.r < 1.25f) return false;  // 1 - p would lose digits beside the 1 at the maximum
  const double unit = static_cast<double>(mass_unit(f.mass_bits)), before = static_cast<double>(head.r) * unit;
  const uint64_t limit = mass_limit(f.top_p, row_mass(f, all));
  if (before > static_cast<double>(limit)) return false;
  int64_t n = r.template collect_between<false>(bracket.low, bracket.high);
  tempered_masses(s.x, n, all.m, f.scale, s.e);
  many->cut = cut_after(s.x, s.id, n, MassWeight{s.e, mass_unit(f.mass_bits)}, limit - static_cast<uint64_t>(before),
                        s.key, s.place);
  if (many->cut.x == neg_inf()) return false;
  n = keep(many->cut, s.x, s.id, n);
  const SumExp inside = tempered_list_sums<false>(s.x, n, all.m, f.scale);
  many->sum = {all.m, (head.r - 1.0f) + inside.r, head.t + inside.t};
  return true;
}

// The winner among ids that the cut keeps. The winner over all ids is mostly kept, and then it is the one.
template <class T>
Sample sample_many(const FilterRow<T>& r, int64_t entry, int64_t row, const Many& many) {
  if (!many.sparse) {
    StatsState st;
    reset_state(&st, r.a.kept);
    stats_fold(r.a, entry, row, 0, r.chunks, &st);
    if (st.sample.id < 0 || many.cut.keeps(st.sample.x, st.sample.id)) return st.sample;
  }
  const int64_t n = keep(many.cut, r.s.x, r.s.id, r.template collect_between<false>(many.cut.x, pos_inf()));
  forbid_listed(r.a, r.s.x, r.s.id, n);
  return sample_of(r.a, entry, r.s.x, r.s.id, n);
}

template <class T>
EntryStats finish_many(const FilterRow<T>& r, int64_t entry, int64_t row, const Many& many, int32_t status) {
  const FilterScratch& s = r.s;
  const Filters& f = r.a.filters;
  SumExp sum = many.sum;
  // As many lane maxima as there are forbidden ids and two more hold two candidates.
  const float floor = larger(-FLT_MAX, lane_floor(s, r.chunks * kStep, 2 + r.a.n_forbid));
  const int64_t n = r.template collect_between<true>(floor, pos_inf());
  forbid_listed(r.a, s.x, s.id, n);
  Cand top[2];
  best_two(s.x, s.id, n, top);
  if (top[0].id < 0) return invalid_stats(status | kStatusAllInf);
  Sample sample = {top[0].v, top[0].id, top[0].v};
  if (!many.cut.keeps(top[0].v, top[0].id)) {
    sum = with_id(sum, top[0].v, f.scale);
    top[1] = no_cand();
  } else if (r.a.temperature > 0.0f) {
    sample = sample_many(r, entry, row, many);
  }
  if (top[1].id >= 0 && !many.cut.keeps(top[1].v, top[1].id)) top[1] = no_cand();
  return finish_filtered(f, sum, sample, top[0], top[1], status);
}

template <class T>
EntryStats filtered(const FilterRow<T>& r, int64_t entry, int64_t row) {
  const FilteredArgs& a = r.a;
  const FilterScratch& s = r.s;
  const Filters& f = a.filters;
  int32_t status = r.copy_changed(entry);
  const SumExp all = r.read();
  if (all.r != all.r) status |= kStatusNaN;
  else if (all.m == neg_inf()) status |= kStatusAllInf;
  if (is_invalid(status)) return invalid_stats(status);

  float floor = -FLT_MAX, likely = -FLT_MAX;
  if (f.by_count()) {
    if (f.top_k <= r.chunks * kStep / 2) floor = larger(floor, lane_floor(s, r.chunks * kStep, f.top_k));
    else likely = likely_floor(r, all.m);
  }
  if (f.by_mass() && !(f.by_count() && f.top_k_first))
    floor = larger(floor, lightest_kept(f, all.m, all.total(), a.vocab));
  int64_t sampled = 0;
  if (!f.by_count() && many_from(r, floor, &sampled)) {
    Many many;
    if (keep_many(r, all, floor, sampled, &many)) return finish_many(r, entry, row, many, status);
  }
  const bool few = f.by_count() && likely == -FLT_MAX;
  int64_t n = few ? r.template collect_between<true>(floor, pos_inf())
                  : r.template collect_between<false>(larger(floor, likely), pos_inf());
  if (likely > floor && n < f.top_k) n = r.template collect_between<false>(floor, pos_inf());
  n = apply(a, s, n, all);
  SumExp sum = tempered_list(s.x, n, all.m, f.scale);

  forbid_listed(a, s.x, s.id, n);
  Cand top[2];
  best_two(s.x, s.id, n, top);
  Sample sample = {top[0].v, top[0].id, top[0].v};
  if (top[0].id < 0) {  // only forbidden ids were kept: the best candidate is, too
    const Cand best = best_candidate(a, entry, row, r.chunks);
    if (best.id < 0) return invalid_stats(status | kStatusAllInf);
    sum = with_id(sum, best.v, f.scale);
    sample = {best.v, best.id, best.v};
    top[0] = best;
  } else if (a.temperature > 0.0f) {
    sample = sample_of(a, entry, s.x, s.id, n);
  }
  return finish_filtered(f, sum, sample, top[0], top[1], status);
}

template <class T>
EntryStats run(const FilteredArgs& a, int64_t entry, int64_t row, const FilterScratch& s) {
  const FilterRow<T> r{a, s, static_cast<const T*>(a.logits) + row * a.row_stride, (a.count + kChunk - 1) / kChunk};
  return a.filters.any() ? filtered(r, entry, row) : unfiltered(r, entry, row);
}

}  // namespace

EntryStats filtered_row(const FilteredArgs& args, int64_t entry, int64_t row, const FilterScratch& scratch) {
  switch (args.type) {
    case FloatType::f32: return run<float>(args, entry, row, scratch);
    case FloatType::bf16: return run<bf16>(args, entry, row, scratch);
    case FloatType::f16: return run<fp16>(args, entry, row, scratch);
  }
  return none_stats();
}

}  // namespace unmask::cpu::UNMASK_ISA_NS
