// Argument checks shared by the CPU and CUDA front ends, so that both say the same words:
//   <op>: <tensor> must be <expected>, got <actual>
// `what` strings are built only when a check fails.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace unmask {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

[[noreturn]] inline void fail_must_be(const char* op, const char* name, const std::string& expected,
                                      const std::string& actual) {
  fail(op, std::string(name) + " must be " + expected + ", got " + actual);
}

// The shim's own codes, fetched once: every accessor is a call across the library boundary, and a small op is all checks.
struct ShimCodes {
  int32_t cuda = aoti_torch_device_type_cuda();
  int32_t float32 = aoti_torch_dtype_float32(), float64 = aoti_torch_dtype_float64(),
          bfloat16 = aoti_torch_dtype_bfloat16(), float16 = aoti_torch_dtype_float16();
  int32_t int64 = aoti_torch_dtype_int64(), int32 = aoti_torch_dtype_int32(), boolean = aoti_torch_dtype_bool();

  int32_t of(ScalarType t) const {
    switch (t) {
      case ScalarType::Float: return float32;
      case ScalarType::Double: return float64;
      case ScalarType::BFloat16: return bfloat16;
      case ScalarType::Half: return float16;
      case ScalarType::Long: return int64;
      case ScalarType::Int: return int32;
      case ScalarType::Bool: return boolean;
      default: return -1;
    }
  }
};

inline const ShimCodes& shim_codes() {
  static const ShimCodes codes;
  return codes;
}

inline int32_t shim_dtype(const Tensor& t) {
  int32_t code = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

inline bool on_cuda(const Tensor& t) {
  int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return type == shim_codes().cuda;
}

// One device for all tensors of a call: every check is made against that of the first.
struct Checker {
  const char* op;
  bool cuda;
  int32_t device_index;

  Checker(const char* op_, const Tensor& first)
      : op(op_), cuda(on_cuda(first)), device_index(cuda ? first.get_device_index() : -1) {}

  std::string device_text(bool is_cuda, int32_t index) const {
    return is_cuda ? "on cuda:" + std::to_string(index) : std::string("on the CPU");
  }
  void device(const Tensor& t, const char* name) const {
    const bool t_cuda = on_cuda(t);
    if (t_cuda != cuda || (cuda && t.get_device_index() != device_index))
      fail_must_be(op, name, device_text(cuda, device_index), device_text(t_cuda, t.get_device_index()));
  }
  void dtype(const Tensor& t, const char* name, ScalarType want) const {
    device(t, name);
    const int32_t code = shim_codes().of(want);
    if (code >= 0 ? shim_dtype(t) != code : t.scalar_type() != want)
      fail_must_be(op, name, dtype_name(want), dtype_name(t.scalar_type()));
  }
  // float32, bfloat16 or float16
  void floating(const Tensor& t, const char* name) const {
    device(t, name);
    const ShimCodes& codes = shim_codes();
    const int32_t code = shim_dtype(t);
    if (code != codes.float32 && code != codes.bfloat16 && code != codes.float16)
      fail_must_be(op, name, "float32, bfloat16 or float16", dtype_name(t.scalar_type()));
  }
  // float32 or float64
  void real(const Tensor& t, const char* name) const {
    device(t, name);
    const int32_t code = shim_dtype(t);
    if (code != shim_codes().float32 && code != shim_codes().float64)
      fail_must_be(op, name, "float32 or float64", dtype_name(t.scalar_type()));
  }
  // Expected sizes; -1 means any. `spec` is the shape as the docstring writes it, e.g. "[T, Hq, D]".
  void shape(const Tensor& t, const char* name, const char* spec, std::initializer_list<int64_t> sizes) const {
    const auto actual = t.sizes();
    bool ok = actual.size() == sizes.size();
    if (ok) {
      size_t i = 0;
      for (int64_t s : sizes) {
        if (s >= 0 && actual[i] != s) {
          ok = false;
          break;
        }
        ++i;
      }
    }
    if (ok) return;
    std::ostringstream want;
    want << spec << " = [";
    bool first = true;
    for (int64_t s : sizes) {
      want << (first ? "" : ", ");
      if (s >= 0) want << s;
      else want << "any";
      first = false;
    }
    want << ']';
    fail_must_be(op, name, want.str(), shape_text(t));
  }
  // A tensor that the op writes in place: an expanded dimension would make several elements share one address.
  void writable(const Tensor& t, const char* name) const {
    const auto sizes = t.sizes(), strides = t.strides();
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (strides[i] == 0 && sizes[i] > 1)
        fail_must_be(op, name, "without expanded dimensions (it is written)",
                     "stride 0 in dimension " + std::to_string(i));
    }
  }
  void require(bool ok, const char* name, const char* expected, int64_t actual) const {
    if (!ok) fail_must_be(op, name, expected, std::to_string(actual));
  }
  void require(bool ok, const char* name, const char* expected, double actual) const {
    if (!ok) fail_must_be(op, name, expected, std::to_string(actual));
  }
};

}  // namespace unmask
