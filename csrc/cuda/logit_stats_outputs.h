// Tensors that the launchers of the logit statistics make: outputs and workspaces.
#pragma once
#include <tuple>

#include <torch/csrc/stable/ops.h>

#include "common/logit_stats_args.h"
#include "cuda/logit_stats.cuh"

namespace unmask::cuda {

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, std::make_optional(type));
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Outputs new_outputs(const Tensor& like, int64_t entries, int64_t n_ids, int64_t topk, StatsOutputs* f) {
  *f = {topk, n_ids, nullptr, nullptr, nullptr};
  Outputs out{empty(like, {entries, f->id_width()}, ScalarType::Long),
              empty(like, {entries, f->value_width()}, ScalarType::Float), empty(like, {entries}, ScalarType::Int)};
  f->ids = data<int64_t>(std::get<0>(out));
  f->values = data<float>(std::get<1>(out));
  f->status = data<int32_t>(std::get<2>(out));
  return out;
}

inline IdSet id_set(const OptTensor& t) {
  if (!t) return {nullptr, 0, 0};
  return {static_cast<const int64_t*>(t->const_data_ptr()), t->size(0), t->stride(0)};
}

}  // namespace unmask::cuda
