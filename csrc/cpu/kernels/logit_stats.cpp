// logit_stats on the CPU: token, softmax statistics and top-k of a row of logits, read once from memory.
//
// Per chunk of kStatsChunk = 4,096 ids (8 KB bf16, 16 KB fp32: stays in L1/L2), with m the chunk's maximum:
//   pass 1  lane maxima (logit_stats_chunk.h); a NaN loses, on purpose
//   pass 2  e = exp_neg(x - m), s += e, t += (x - m) e: 14 vector operations; a NaN anywhere makes s NaN. A chunk whose
//           maximum stands out (s < 1.5) is summed again without it
//   scan    only if m beats the worst candidate kept so far: ids above both that and the k-th largest lane maximum
//   noise   only if temperature > 0: Philox words, then a bound on the noise that costs 6 operations; the two logarithms
//           run only for vectors where the bound could win
// then the chunk's (m, r, t) merges into the running state. Bytes: V x sizeof(dtype) per row; about 12 FLOP an id.
// Memory-bound when the rows come from DRAM.
//
// Chunks that hold suppressed, biased or forbidden ids, or lie in memory with a column stride, are copied to a 16 KB
// fp32 scratch first; fp32 holds every bf16 and fp16 value, and the lane of an id depends only on its place in the
// chunk, so results do not depend on strides, alignment, threads or tiling. With guidance every chunk is first combined into
// a buffer of the logits' own dtype (logit_stats_guided.h), which then stands for the row.
#include "cpu/logit_stats_kernels.h"

#include "cpu/logit_stats_chunk.h"
#include "cpu/logit_stats_guided.h"
#include "cpu/philox_vec.h"

namespace unmask::cpu::UNMASK_ISA_NS {
namespace {

constexpr int kChunk = static_cast<int>(kStatsChunk);

UNMASK_INLINE void fold_sum(const SumExp& sum, StatsState* st) {
  if (sum.r != sum.r) st->status |= kStatusNaN;
  st->sum = merge_sum(st->sum, sum);
}

// ---- candidates ---------------------------------------------------------------------------------------------------
// The largest float below x > -inf.
UNMASK_INLINE float below(float x) {
  if (x == 0.0f) return -0x1p-149f;
  return bits_to_float(float_to_bits(x) + (x > 0.0f ? 0xFFFFFFFFu : 1u));
}

// The k-th largest lane maximum is at most the chunk's k-th best value (the lane maxima are different ids; kStep >=
// kTopMax), so only ids at or above it can enter, and only ids above the k-th kept: one bar for both, `bar < x`. Ties
// with what is kept lose: ids rise.
template <class T>
UNMASK_INLINE void fold_candidates(const T* x, int n, int64_t base, const float* lanes, float m, StatsState* st) {
  static_assert(kStep >= kTopMax, "the lane maxima must bound the k-th best");
  const int k = st->kept;
  Cand* top = st->top;
  if (!(m > top[k - 1].v)) return;
  float best[kTopMax];
  for (int i = 0; i < k; ++i) best[i] = neg_inf();
  for (int i = 0; i < kStep; ++i) {
    float v = lanes[i];
    if (!(v > best[k - 1])) continue;
    for (int j = 0; j < k; ++j) {
      if (v > best[j]) {
        const float old = best[j];
        best[j] = v;
        v = old;
      }
    }
  }
  const float floor = best[k - 1] > neg_inf() ? below(best[k - 1]) : neg_inf();
  float bar = top[k - 1].v > floor ? top[k - 1].v : floor;
  vf vbar = vset(bar);
  for (int i = 0; i < n; i += kStep) {
    const int len = n - i < kStep ? n - i : kStep;
    if (len == kStep) {
      vf v[kAcc];
      for (int a = 0; a < kAcc; a += 2) load_pair(x + i + a * kW, &v[a], &v[a + 1]);
      if (__builtin_expect(vgt_mask(vmax(vmax(v[0], v[1]), vmax(v[2], v[3])), vbar) == 0, 1)) continue;
    }
    for (int j = 0; j < len; ++j) {
      const float v = to_float(x[i + j]);
      if (!(v > bar)) continue;
      insert_cand(top, k, {v, static_cast<int32_t>(base + i + j)});
      bar = top[k - 1].v > bar ? top[k - 1].v : bar;
    }
    vbar = vset(bar);
  }
}

// ---- noise --------------------------------------------------------------------------------------------------------
// g <= -ln v with v = (w + 1/2) / 2^32, because -ln(1 - v) >= v. The bits of a float, read as a fixed-point number,
// are at most its log2 (plus 127), so with b = bits(2 float(w >> 1) + 1/2): g <= ln2 (159 - b / 2^23) + slack for the
// roundings. fma is monotonic, so a score never exceeds fma(T, bound, x).
UNMASK_INLINE vf score_bound(const uint32_t* words, vf x, vf temperature) {
  const vf b = vbits_value(vfma(vload_half(words), vset(2.0f), vset(0.5f)));
  return vfma(temperature, vfma(b, vset(-0x1.62e430p-24f), vset(159.0f * 0.69314718f + 0.01f)), x);
}

template <class T>
UNMASK_INLINE void exact_scores(const T* x, int n, int64_t base, const uint32_t* words, float temperature,
                                Sample* best) {
  float g[kW], value[kW];
  for (int l = 0; l < kW; ++l) g[l] = gumbel_from_bits(words[l]);
  vstore(value, n >= kW ? vload(x) : vload_n(x, n, neg_inf()));
  for (int l = 0; l < kW; ++l) {
    const float score = noisy_score(temperature, g[l], value[l]);
    if (score > best->score) *best = {score, static_cast<int32_t>(base + l), value[l]};
  }
}

template <class T>
UNMASK_INLINE void fold_noise(const T* x, int n, int64_t base, const NoiseKey& key, float temperature, StatsState* st) {
  const vf vt = vset(temperature);
  Sample best = st->sample;
  vf bar = vset(best.score);
  alignas(64) uint32_t words[kPhiloxIds];
  for (int i = 0; i < n; i += kPhiloxIds) {
    philox_words(key, static_cast<uint32_t>((base + i) >> 2), words);
    for (int j = 0; j < kPhiloxIds && i + j < n; j += 2 * kW) {
      const T* xj = x + i + j;
      const int left = n - i - j;
      if (left >= 2 * kW) {
        const vf a = score_bound(words + j, vload(xj), vt), b = score_bound(words + j + kW, vload(xj + kW), vt);
        if (__builtin_expect(vgt_mask(vmax(a, b), bar) == 0, 1)) continue;
      }
      exact_scores(xj, left, base + i + j, words + j, temperature, &best);
      if (left > kW) exact_scores(xj + kW, left - kW, base + i + j + kW, words + j + kW, temperature, &best);
      bar = vset(best.score);
    }
  }
  st->sample = best;
}

// ---- one chunk ----------------------------------------------------------------------------------------------------
template <class T>
UNMASK_INLINE void fold_wins(const StatsArgs& a, const T* x, int n, int64_t base, const NoiseKey& key,
                             const float* lanes, float m, StatsState* st) {
  fold_candidates(x, n, base, lanes, m, st);
  if (a.temperature > 0.0f) fold_noise(x, n, base, key, a.temperature, st);
}

template <class T, int kRows>
void fold_chunk(const StatsArgs& a, const T* x, int n, int64_t base, const NoiseKey& key, const Ahead<kRows>& ahead,
                StatsState* st) {
  float lanes[kStep];
  chunk_max(x, n, lanes);
  const float m = max_of(lanes);
  fold_sum(chunk_sum_any(x, n, m, ahead), st);
  fold_wins(a, x, n, base, key, lanes, m, st);
}

// First element of a sorted list that is >= id.
UNMASK_INLINE int64_t first_at_least(const int32_t* list, int64_t n, int64_t id) {
  int64_t lo = 0, hi = n;
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if (list[mid] < id) lo = mid + 1;
    else hi = mid;
  }
  return lo;
}
UNMASK_INLINE bool contains(const int32_t* list, int64_t n, int64_t id) {
  const int64_t i = first_at_least(list, n, id);
  return i < n && list[i] == id;
}

template <class T>
void to_scratch(const T* x, int64_t stride, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = to_float(x[i * stride]);
}

// The chunk's values as the softmax sees them, in fp32: biased in list order, suppressed ids at -inf.
template <class T>
void modified_chunk(const StatsArgs& a, int64_t entry, const T* x, int64_t stride, int n, int64_t base, float* out) {
  to_scratch(x, stride, n, out);
  for (int64_t j = 0; j < a.n_bias; ++j) {
    const int64_t id = a.bias_ids[entry * a.bias_ids_stride[0] + j * a.bias_ids_stride[1]] - base;
    if (id >= 0 && id < n) out[id] = out[id] + a.bias[entry * a.bias_stride[0] + j * a.bias_stride[1]];
  }
  for (int64_t j = first_at_least(a.suppress, a.n_suppress, base); j < a.n_suppress && a.suppress[j] < base + n; ++j)
    out[a.suppress[j] - base] = neg_inf();
}

template <class T> constexpr bool kEvenOdd = false;
template <> constexpr bool kEvenOdd<bf16> = true;

template <class T>
void fold(const StatsArgs& a, int64_t entry, int64_t row, int64_t chunk_begin, int64_t chunk_end, StatsState* st) {
  const T* x = static_cast<const T*>(a.logits) + row * a.row_stride;
  const bool two = a.null_logits != nullptr;
  const T* u = two ? static_cast<const T*>(a.null_logits) + row * a.null_row_stride : nullptr;
  const int64_t stride = two ? 1 : a.col_stride;  // of what the passes read
  T mixed[kChunk];
  NoiseKey key;
  if (a.temperature > 0.0f) {
    set_key(&key, static_cast<uint64_t>(a.seed[entry * a.seed_stride]),
            static_cast<uint32_t>(a.pos[entry * a.pos_stride]), static_cast<uint32_t>(a.step[entry * a.step_stride]));
  }
  uint64_t biased = 0;  // bit c % 64: a chunk c that may hold a biased id
  for (int64_t j = 0; j < a.n_bias; ++j) {
    const int64_t id = a.bias_ids[entry * a.bias_ids_stride[0] + j * a.bias_ids_stride[1]];
    if (id >= a.vocab) st->status |= kStatusBadId;
    else if (id >= 0) biased |= uint64_t{1} << ((id / kChunk) & 63);
  }
  for (int64_t c = chunk_begin; c < chunk_end; ++c) {
    const int64_t first = c * kChunk, base = a.offset + first;
    const int n = static_cast<int>(a.count - first < kChunk ? a.count - first : kChunk);
    const T* chunk = x + first * a.col_stride;
    const T* null_chunk = two ? u + first * a.null_col_stride : nullptr;
    if (two) guide_chunk(chunk, a.col_stride, null_chunk, a.null_col_stride, n, a.guidance, mixed);
    const int64_t fb = first_at_least(a.forbid, a.n_forbid, base), fe = first_at_least(a.forbid, a.n_forbid, base + n);
    const int64_t sb = first_at_least(a.suppress, a.n_suppress, base);
    const bool changed =
        fb < fe || (sb < a.n_suppress && a.suppress[sb] < base + n) || ((biased >> ((base / kChunk) & 63)) & 1) != 0;
    if (stride == 1 && !changed) {
      if (two) {
        const Ahead<2> ahead = {{chunk_after(chunk).at[0], chunk_after(null_chunk).at[0]}};
        fold_chunk(a, mixed, n, base, key, ahead, st);
      } else {
        fold_chunk(a, chunk, n, base, key, chunk_after(chunk), st);
      }
      continue;
    }
    float scratch[kChunk], lanes[kStep];
    modified_chunk(a, entry, two ? mixed : chunk, stride, n, base, scratch);
    chunk_max(scratch, n, lanes);
    float m = max_of(lanes);
    const Ahead<1> ahead = chunk_after(chunk);
    fold_sum(kEvenOdd<T> ? chunk_sum_any(reinterpret_cast<const EvenOdd*>(scratch), n, m, ahead)
                         : chunk_sum_any(scratch, n, m, ahead),
             st);
    if (fb < fe) {  // forbidden ids stay in the sum but cannot win
      for (int64_t j = fb; j < fe; ++j) scratch[a.forbid[j] - base] = neg_inf();
      chunk_max(scratch, n, lanes);
      m = max_of(lanes);
    }
    fold_wins(a, scratch, n, base, key, lanes, m, st);
  }
  if (!(a.temperature > 0.0f)) st->sample = {st->top[0].v, st->top[0].id, st->top[0].v};
}

template <class T>
int32_t at_ids(const StatsArgs& a, int64_t entry, int64_t row, float* out, int64_t stride) {
  const T* x = static_cast<const T*>(a.logits) + row * a.row_stride;
  const T* u = a.null_logits != nullptr ? static_cast<const T*>(a.null_logits) + row * a.null_row_stride : nullptr;
  int32_t status = 0;
  for (int64_t i = 0; i < a.n_ids; ++i) {
    const int64_t id = a.ids[entry * a.ids_stride[0] + i * a.ids_stride[1]];
    if (id >= a.vocab) status |= kStatusBadId;
    if (id < a.offset || id >= a.offset + a.count) continue;
    const T c = x[(id - a.offset) * a.col_stride];
    float v = to_float(u == nullptr ? c : guided(c, u[(id - a.offset) * a.null_col_stride], a.guidance));
    for (int64_t j = 0; j < a.n_bias; ++j) {
      if (a.bias_ids[entry * a.bias_ids_stride[0] + j * a.bias_ids_stride[1]] == id)
        v = v + a.bias[entry * a.bias_stride[0] + j * a.bias_stride[1]];
    }
    out[i * stride] = contains(a.suppress, a.n_suppress, id) ? neg_inf() : v;
  }
  return status;
}

}  // namespace

void stats_fold(const StatsArgs& args, int64_t entry, int64_t row, int64_t chunk_begin, int64_t chunk_end,
                StatsState* state) {
  switch (args.type) {
    case FloatType::f32: return fold<float>(args, entry, row, chunk_begin, chunk_end, state);
    case FloatType::bf16: return fold<bf16>(args, entry, row, chunk_begin, chunk_end, state);
    case FloatType::f16: return fold<fp16>(args, entry, row, chunk_begin, chunk_end, state);
  }
}

void stats_merge(StatsState* into, const StatsState* right) {
  into->status |= right->status;
  into->sum = merge_sum(into->sum, right->sum);
  for (int i = 0; i < into->kept; ++i) insert_cand(into->top, into->kept, right->top[i]);
  if (beats(right->sample, into->sample)) into->sample = right->sample;
}

int32_t stats_at_ids(const StatsArgs& args, int64_t entry, int64_t row, float* out, int64_t stride) {
  switch (args.type) {
    case FloatType::f32: return at_ids<float>(args, entry, row, out, stride);
    case FloatType::bf16: return at_ids<bf16>(args, entry, row, out, stride);
    case FloatType::f16: return at_ids<fp16>(args, entry, row, out, stride);
  }
  return 0;
}

void stats_outputs(const StatsOutputs& args, int64_t entry, const StatsState* state) {
  const EntryStats r = finish_stats(*state);
  const bool none = state->next == 0, valid = !none && !is_invalid(r.status);
  args.write(entry, r);
  for (int64_t i = 0; i < args.n_ids; ++i) {
    float* at = args.at_ids(entry) + 2 * i;
    if (!valid) at[1] = none ? 0.0f : quiet_nan();
    at[0] = valid ? log_probability(at[1], state->sum) : at[1];
  }
  for (int64_t k = 0; k < args.topk; ++k) {
    const Cand c = valid && k < state->kept ? state->top[k] : no_cand();
    args.topk_id(entry)[k] = c.id;
    args.topk_logit(entry)[k] = c.v;
  }
}

}  // namespace unmask::cpu::UNMASK_ISA_NS
