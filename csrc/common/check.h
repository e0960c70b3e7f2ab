// Argument checks shared by the CPU and CUDA front ends, so that both say the same words:
//   <op>: <tensor> must be <expected>, got <actual>
// `what` strings are built only when a check fails.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace unmask {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    default: return "another dtype";
  }
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream s;
  s << '[';
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << ']';
  return s.str();
}

[[noreturn]] inline void fail(const char* op, const std::string& text) {
  STD_TORCH_CHECK(false, op, ": ", text);
  __builtin_unreachable();
}

[[noreturn]] inline void fail_must_be(const char* op, const char* name, const std::string& expected, const std::string& actual) {
  fail(op, std::string(name) + " must be " + expected + ", got " + actual);
}

// One device for all tensors of a call: every check is made against that of the first.
struct Checker {
  const char* op;
  bool cuda;
  int32_t device_index;

  Checker(const char* op_, const Tensor& first) : op(op_), cuda(first.is_cuda()), device_index(first.get_device_index()) {}

  std::string device_text(bool is_cuda, int32_t index) const {
    return is_cuda ? "on cuda:" + std::to_string(index) : std::string("on the CPU");
  }
  void device(const Tensor& t, const char* name) const {
    if (t.is_cuda() != cuda || (cuda && t.get_device_index() != device_index))
      fail_must_be(op, name, device_text(cuda, device_index), device_text(t.is_cuda(), t.get_device_index()));
  }
  void dtype(const Tensor& t, const char* name, ScalarType want) const {
    device(t, name);
    if (t.scalar_type() != want) fail_must_be(op, name, dtype_name(want), dtype_name(t.scalar_type()));
  }
  // float32, bfloat16 or float16
  void floating(const Tensor& t, const char* name) const {
    device(t, name);
    const ScalarType s = t.scalar_type();
    if (s != ScalarType::Float && s != ScalarType::BFloat16 && s != ScalarType::Half)
      fail_must_be(op, name, "float32, bfloat16 or float16", dtype_name(s));
  }
  // Expected sizes; -1 means any. `spec` is the shape as the docstring writes it, e.g. "[T, Hq, D]".
  void shape(const Tensor& t, const char* name, const char* spec, std::initializer_list<int64_t> sizes) const {
    bool ok = t.dim() == static_cast<int64_t>(sizes.size());
    if (ok) {
      int64_t i = 0;
      for (int64_t s : sizes) {
        if (s >= 0 && t.size(i) != s) { ok = false; break; }
        ++i;
      }
    }
    if (ok) return;
    std::ostringstream want;
    want << spec << " = [";
    bool first = true;
    for (int64_t s : sizes) {
      want << (first ? "" : ", ");
      if (s >= 0) want << s; else want << "any";
      first = false;
    }
    want << ']';
    fail_must_be(op, name, want.str(), shape_text(t));
  }
  void require(bool ok, const char* name, const char* expected, int64_t actual) const {
    if (!ok) fail_must_be(op, name, expected, std::to_string(actual));
  }
  void require(bool ok, const char* name, const char* expected, double actual) const {
    if (!ok) fail_must_be(op, name, expected, std::to_string(actual));
  }
};

}  // namespace unmask
