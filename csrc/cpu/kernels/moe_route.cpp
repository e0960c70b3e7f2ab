// moe_route and moe_combine on the CPU: tokens one after the other. Loops over experts are plain C that the compiler vectorises; the
// arithmetic is common/moe_route.h's, so every ISA gives the same bits. With 256 experts in fp64 lanes the scores are about two thirds of
// a token's time, the choice (a maximum of 8 block maxima and of one block, per expert chosen) the rest.
#include "cpu/moe_route_kernels.h"

#include "common/online.h"
#include "cpu/vec.h"

namespace unmask::cpu::UNMASK_ISA_NS {
namespace {

constexpr int kBlock = 32;  // keys under one maximum
constexpr int kMax = static_cast<int>(kMaxExperts);

UNMASK_INLINE uint32_t largest(const uint32_t* key, int n) {
  uint32_t m = kNotChoosable;
  for (int i = 0; i < n; ++i) m = key[i] > m ? key[i] : m;
  return m;
}
UNMASK_INLINE int first_of(const uint32_t* key, uint32_t wanted) {  // which is there
  int i = 0;
  while (key[i] != wanted) ++i;
  return i;
}

// Keys with the largest of every kBlock, to take the highest again and again: equal ones lowest index first.
struct Keys {
  uint32_t key[kMax], best[kMax / kBlock];
  int blocks;

  // After key[0, n) was written; n is not above kMax, a multiple of kBlock.
  void count(int n) {
    blocks = (n + kBlock - 1) / kBlock;
    for (int i = n; i < blocks * kBlock; ++i) key[i] = kNotChoosable;
    for (int b = 0; b < blocks; ++b) best[b] = largest(key + b * kBlock, kBlock);
  }
  int take() {
    const int b = first_of(best, largest(best, blocks));
    uint32_t* const block = key + b * kBlock;
    const int i = first_of(block, best[b]);
    block[i] = kNotChoosable;
    best[b] = largest(block, kBlock);
    return b * kBlock + i;
  }
};

struct Work {
  float logit[kMax], score[kMax];
  Keys choice, worth;
  bool kept[kMax];
};

void softmax_scores(const float* x, int n, float* score) {
  float top = neg_inf();
  for (int i = 0; i < n; ++i) top = x[i] > top ? x[i] : top;
  for (int i = 0; i < n; ++i) score[i] = rounded_exp(x[i] - top);
  double sum[kSoftmaxLanes] = {};
  int i = 0;
  for (; i + kSoftmaxLanes <= n; i += kSoftmaxLanes)
    for (int l = 0; l < kSoftmaxLanes; ++l) sum[l] = sum[l] + static_cast<double>(score[i + l]);
  for (int l = 0; i + l < n; ++l) sum[l] = sum[l] + static_cast<double>(score[i + l]);
  for (int by = kSoftmaxLanes / 2; by > 0; by /= 2)
    for (int l = 0; l < by; ++l) sum[l] = sum[l] + sum[l + by];
  const float total = static_cast<float>(sum[0]);
  for (int e = 0; e < n; ++e) score[e] = score[e] / total;
}

// Leaves the experts of the best groups choosable only.
void keep_groups(const RouteParams& p, Work& w) {
  const int groups = static_cast<int>(p.groups), size = static_cast<int>(p.experts / p.groups);
  for (int g = 0; g < groups; ++g) {
    uint32_t* const key = w.choice.key + g * size;
    uint32_t worth = largest(key, size);
    if (size > 1) {
      const uint32_t first = worth;
      const int at = first_of(key, first);
      key[at] = kNotChoosable;
      worth = choice_key(choice_of_key(first) + choice_of_key(largest(key, size)));
      key[at] = first;
    }
    w.worth.key[g] = worth;
    w.kept[g] = false;
  }
  w.worth.count(groups);
  for (int64_t k = 0; k < p.kept; ++k) w.kept[w.worth.take()] = true;
  for (int g = 0; g < groups; ++g)
    for (int i = g * size; !w.kept[g] && i < (g + 1) * size; ++i) w.choice.key[i] = kNotChoosable;
}

void route_token(const RouteParams& p, int64_t token, Work& w) {
  const int n = static_cast<int>(p.experts);
  const float* x = p.logits + token * p.logits_stride[0];
  if (p.logits_stride[1] != 1) {
    for (int e = 0; e < n; ++e) w.logit[e] = p.logit(token, e);
    x = w.logit;
  }
  if (p.softmax) softmax_scores(x, n, w.score);
  else
    for (int e = 0; e < n; ++e) w.score[e] = sigmoid_score(x[e]);
  uint32_t* const key = w.choice.key;
  if (p.bias == nullptr)
    for (int e = 0; e < n; ++e) key[e] = choice_key(w.score[e]);
  else if (p.bias_stride == 1)
    for (int e = 0; e < n; ++e) key[e] = choice_key(w.score[e] + p.bias[e]);
  else
    for (int e = 0; e < n; ++e) key[e] = choice_key(w.score[e] + p.bias[e * p.bias_stride]);
  if (p.kept < p.groups) keep_groups(p, w);
  w.choice.count(n);
  int64_t* const expert = p.expert + token * p.top_k;
  float* const weight = p.weight + token * p.top_k;
  for (int64_t j = 0; j < p.top_k; ++j) {
    expert[j] = w.choice.take();
    weight[j] = w.score[expert[j]];
  }
  finish_weights(p, weight);
}

template <class T>
void combine(const CombineParams& p, int64_t begin, int64_t end) {
  const T* const y = static_cast<const T*>(p.y);
  for (int64_t t = begin; t < end; ++t) {
    T* const out = static_cast<T*>(p.out) + t * p.dim;
    const int64_t* const place = p.place + t * p.place_stride[0];
    const float* const weight = p.weight + t * p.weight_stride[0];
    for (int64_t i = 0; i < p.dim; i += kW) {
      const int m = static_cast<int>(p.dim - i < kW ? p.dim - i : kW);
      vf sum = vset(0.0f);
      for (int64_t j = 0; j < p.top_k; ++j) {
        const int64_t at = place[j * p.place_stride[1]];
        if (at < 0 || at >= p.rows) continue;
        const T* const from = y + at * p.y_row + i;
        const vf v = m == kW ? vload(from) : vload_n(from, m, 0.0f);
        sum = vadd(sum, vmul(v, vset(weight[j * p.weight_stride[1]])));  // not fused: as the definition
      }
      if (m == kW) vstore(out + i, sum);
      else vstore_n(out + i, sum, m);
    }
  }
}

}  // namespace

void route_tokens(const RouteParams& params, int64_t begin, int64_t end) {
  Work work;
  for (int64_t t = begin; t < end; ++t) {
    if (params.live(t)) {
      route_token(params, t, work);
      continue;
    }
    for (int64_t j = t * params.top_k; j < (t + 1) * params.top_k; ++j) params.expert[j] = -1, params.weight[j] = 0.0f;
  }
}

void combine_rows(const CombineParams& params, int64_t begin, int64_t end) {
  if (params.dtype == 0) combine<float>(params, begin, end);
  else if (params.dtype == 1) combine<bf16>(params, begin, end);
  else combine<fp16>(params, begin, end);
}

}  // namespace unmask::cpu::UNMASK_ISA_NS
