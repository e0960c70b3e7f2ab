// kl_stats on the CPU: one chunk of two rows, each read once. 17 vector operations for kW ids: with bf16 rows the bound is about half DRAM,
// half arithmetic. Rows with a column stride are copied to fp32 first; the lane of an id depends only on its place in the chunk.
#include "cpu/kl_stats_kernels.h"

#include "cpu/filtered_stats_sums.h"

namespace unmask::cpu::UNMASK_ISA_NS {
namespace {

constexpr int kChunk = static_cast<int>(kStatsChunk);

// s += p (max(ln p, L) - max(ln q, L)) for U pairs of vectors. vmax gives its second operand for a NaN: it stays one.
template <int U>
UNMASK_INLINE void add_kl(const vf* x, const vf* y, vf lse, vf previous_lse, vf* s) {
  const vf one = vset(1.0f), least = vset(kLogFloor);
  vf lp[U], d[U], p[U];
  tempered_exps<U>(x, lse, one, lp, d, p);  // lp: ln p, before the clamp
  for (int u = 0; u < U; ++u) {
    const vf lq = vmax(least, vsub(y[u], previous_lse));
    s[u] = vfma(p[u], vsub(vmax(least, lp[u]), lq), s[u]);
  }
}

template <class T>
float sum_chunk(const T* x, const T* y, int n, float lse, float previous_lse) {
  const vf a = vset(lse), b = vset(previous_lse);
  constexpr int kIds = kChains * kW;
  vf u[kChains], v[kChains], sum = vset(0.0f);
  for (int i = 0; i < n;) {
    const int stop = i + 64 * kIds < n ? i + 64 * kIds : n;
    vf s[kChains];
    for (int c = 0; c < kChains; ++c) s[c] = vset(0.0f);
    for (; i + kIds <= stop; i += kIds) {
      for (int c = 0; c < kChains; c += 2) {
        load_pair(x + i + c * kW, &u[c], &u[c + 1]);
        load_pair(y + i + c * kW, &v[c], &v[c + 1]);
      }
      add_kl<kChains>(u, v, a, b, s);
    }
    for (; i < stop; i += kPair) {
      if (i + kPair <= n) {
        load_pair(x + i, &u[0], &u[1]);
        load_pair(y + i, &v[0], &v[1]);
      } else {  // -inf: p = 0
        load_pair_n(x + i, n - i, &u[0], &u[1]);
        load_pair_n(y + i, n - i, &v[0], &v[1]);
      }
      add_kl<2>(u, v, a, b, s);
    }
    for (int c = 0; c < kChains; c += 2) sum = vadd(sum, vadd(s[c], s[c + 1]));
  }
  return vreduce_add(sum);
}

// The chunk in place, or a dense copy.
template <class T>
const T* dense_chunk(const void* rows, int64_t row, const int64_t* stride, int64_t first, int n, T* copy) {
  const T* x = static_cast<const T*>(rows) + row * stride[0] + first * stride[1];
  if (stride[1] == 1) return x;
  for (int i = 0; i < n; ++i) copy[i] = x[i * stride[1]];
  return copy;
}

template <class T>
float run(const KlInputs& a, int64_t entry, int64_t chunk) {
  T copy[2][kChunk];
  const int64_t first = chunk * kChunk;
  const int n = static_cast<int>(a.vocab - first < kChunk ? a.vocab - first : kChunk);
  const T* x = dense_chunk(a.logits, a.row(entry), a.stride, first, n, copy[0]);
  const T* y = dense_chunk(a.previous, a.previous_row(entry), a.previous_stride, first, n, copy[1]);
  return sum_chunk(x, y, n, a.lse[entry * a.lse_stride], a.previous_lse[entry * a.previous_lse_stride]);
}

}  // namespace

float kl_chunk(const KlInputs& args, int64_t entry, int64_t chunk) {
  switch (args.type) {
    case FloatType::f32: return run<float>(args, entry, chunk);
    case FloatType::bf16: return run<bf16>(args, entry, chunk);
    case FloatType::f16: return run<fp16>(args, entry, chunk);
  }
  return quiet_nan();
}

}  // namespace unmask::cpu::UNMASK_ISA_NS
