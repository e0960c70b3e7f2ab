// Argument checks of verify_ratio, the same on every backend.
#pragma once
#include <cfloat>
#include <cmath>
#include <tuple>

#include "common/logit_stats_args.h"
#include "common/verify_ratio.h"

namespace unmask {

struct RatioArguments {
  const Tensor &p_logits, &q_logits, &p_row, &q_row, &token, &cu;
  const OptTensor &seed, &step, &pos, &uniforms, &forbid;
  double temper, temperature;
  bool resample;
};

inline Strided<const int64_t> ratio_ids(const Tensor& t) {
  return {static_cast<const int64_t*>(t.const_data_ptr()), t.stride(0)};
}
inline RatioSide ratio_side(const Tensor& logits, const Tensor& row) {
  return {logits.const_data_ptr(),
          {logits.stride(0), logits.size(1) == 1 ? int64_t{1} : logits.stride(1)},
          logits.size(0),
          ratio_ids(row)};
}

// Everything but what a backend does with the ids to forbid, whose dtype and shape are checked here.
inline RatioInputs read_ratio_inputs(const Checker& check, const RatioArguments& in) {
  check.floating(in.p_logits, "p_logits");
  const ScalarType type = in.p_logits.scalar_type();
  check.dtype(in.q_logits, "q_logits", type);
  check.dtype(in.p_row, "p_row", ScalarType::Long);
  check.dtype(in.q_row, "q_row", ScalarType::Long);
  check.dtype(in.token, "token", ScalarType::Long);
  check.dtype(in.cu, "cu", ScalarType::Long);
  const struct {
    const OptTensor& tensor;
    const char* name;
  } keys[3] = {{in.seed, "seed"}, {in.step, "step"}, {in.pos, "pos"}};
  for (const auto& key : keys) {
    if (key.tensor) check.dtype(*key.tensor, key.name, ScalarType::Long);
    else if (!in.uniforms || in.resample)
      fail_must_be(check.op, key.name, "given unless uniforms are and resample is off", "None");
  }
  if (in.uniforms) check.real(*in.uniforms, "uniforms");
  if (in.forbid) check.dtype(*in.forbid, "forbid", ScalarType::Long);

  RatioInputs a{};
  check.shape(in.p_logits, "p_logits", "[P, V]", {-1, -1});
  a.vocab = in.p_logits.size(1);
  check.require(a.vocab >= 1 && a.vocab <= INT32_MAX, "V of p_logits", "1 to 2147483647", a.vocab);
  check.shape(in.q_logits, "q_logits", "[Q, V]", {-1, a.vocab});
  check.shape(in.p_row, "p_row", "[N]", {-1});
  a.positions = in.p_row.size(0);
  check.shape(in.q_row, "q_row", "[N]", {a.positions});
  check.shape(in.token, "token", "[N]", {a.positions});
  check.shape(in.cu, "cu", "[B + 1]", {-1});
  check.require(in.cu.size(0) >= 1, "B + 1 of cu", "at least 1", in.cu.size(0));
  a.spans = in.cu.size(0) - 1;
  for (const auto& key : keys)
    if (key.tensor) check.shape(*key.tensor, key.name, "[N]", {a.positions});
  if (in.uniforms) check.shape(*in.uniforms, "uniforms", "[N]", {a.positions});
  if (in.forbid) check.shape(*in.forbid, "forbid", "[F]", {-1});
  check.require(std::isfinite(in.temper) && in.temper > 0.0, "temper", "a finite number > 0", in.temper);
  check.require(static_cast<float>(in.temperature) > 0.0f && in.temperature <= kMaxTemperature, "temperature",
                "a number in (0, 1e30]", in.temperature);

  a.type = type == ScalarType::Float ? FloatType::f32 : type == ScalarType::BFloat16 ? FloatType::bf16 : FloatType::f16;
  a.side[0] = ratio_side(in.p_logits, in.p_row);
  a.side[1] = ratio_side(in.q_logits, in.q_row);
  a.token = ratio_ids(in.token), a.cu = ratio_ids(in.cu);
  if (in.seed) a.seed = ratio_ids(*in.seed);
  if (in.step) a.step = ratio_ids(*in.step);
  if (in.pos) a.pos = ratio_ids(*in.pos);
  if (in.uniforms)
    a.uniforms = {in.uniforms->const_data_ptr(), in.uniforms->stride(0),
                  shim_dtype(*in.uniforms) == shim_codes().float64};
  a.temper = in.temper;
  const double inverse = 1.0 / static_cast<double>(static_cast<float>(in.temperature));
  a.scale = static_cast<float>(inverse < static_cast<double>(FLT_MAX) ? inverse : static_cast<double>(FLT_MAX));
  a.resample = in.resample;
  return a;
}

using RatioTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // accepted, next, log_ratio, status

// The op with the schema's arguments; kRun is a backend's part of it.
template <RatioTensors (*kRun)(const Checker&, const RatioArguments&)>
RatioTensors verify_ratio_op(const Tensor& p_logits, const Tensor& q_logits, const Tensor& p_row, const Tensor& q_row,
                             const Tensor& token, const Tensor& cu, const OptTensor& seed, const OptTensor& step,
                             const OptTensor& pos, const OptTensor& uniforms, const OptTensor& forbid, double temper,
                             double temperature, bool resample) {
  return kRun(Checker("verify_ratio", p_logits), {p_logits, q_logits, p_row, q_row, token, cu, seed, step, pos,
                                                  uniforms, forbid, temper, temperature, resample});
}

}  // namespace unmask
