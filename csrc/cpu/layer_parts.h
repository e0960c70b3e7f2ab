// The parts of a layer as plain calls, for ops that run several in one: arguments are checked by the caller, outputs are the caller's.
#pragma once
#include <cstdint>
#include <optional>

#include <torch/csrc/stable/tensor.h>

namespace unmask::cpu {

using torch::stable::Tensor;

// The first `rows` rows of add_rms_norm (residual not null) or rms_norm. x, residual, weight: dense rows; out: [T, D] dense.
void norm_into(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps, int64_t rows, Tensor& out);

// The first `rows` rows of silu_mul. gate_up: dense rows; out: [T, F] dense.
void silu_mul_into(const Tensor& gate_up, int64_t rows, Tensor& out);

// y += x in the first `rows` rows, rounded to the dtype. y: [T, N]; x: [T, N] or, one row for all, [N]; dense rows.
void add_rows(Tensor& y, const Tensor& x, int64_t rows);

// rope_append; norm weights and inv_freq dense. Rotated q -> out [T, Hq, D] dense.
void rope_append_into(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                      const Tensor& row, const Tensor& pos, const Tensor& slot, const std::optional<Tensor>& v_slot,
                      const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight,
                      const Tensor& inv_freq, double eps, const std::optional<Tensor>& status, Tensor& out);

// block_attention. out: [T, Hq, D] or [T, Hq D], lse: [T, Hq], both dense.
void block_attention_into(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& cu_q,
                          const Tensor& kv_row, const Tensor& seg, const std::optional<Tensor>& q_end,
                          const std::optional<Tensor>& mask, double scale, const std::optional<Tensor>& status,
                          Tensor& out, Tensor& lse);

}  // namespace unmask::cpu
