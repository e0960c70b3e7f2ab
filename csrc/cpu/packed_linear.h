// y = x W^T with a weight that oneDNN packed (torch.ops.mkldnn._reorder_linear_weight), for C++ that runs several products in one op.
//
// It is reached through the C function that AOTInductor's compiled models call, in the product's own dtype and bits: the same call of the
// library as torch.ops.mkldnn._linear_pointwise, without the dispatcher. The symbol is weak: a torch built without oneDNN lacks it, and
// the library must load there (Python then keeps to the ops; see unmask/ops/packed.py).
#pragma once
#include <cstdint>

#include "common/check.h"

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle w, AtenTensorHandle* bias, const char* attr, const double** scalars,
    int64_t n_scalars, const char** algorithm, AtenTensorHandle* y);

namespace unmask::cpu {

inline bool has_packed_linear() { return aoti_torch_cpu__linear_pointwise != nullptr; }

// With a row count that is a multiple of this the product gives a row the same bits in any batch (unmask.ops.linear.ROW_MULTIPLE).
constexpr int64_t kPackedRows = 16;

// Outputs and inputs [N, K] of a packed weight.
struct PackedShape { int64_t out, in; };

// w: packed, of x's dtype, float32 or bfloat16, [N, K]; -1 where any size will do.
inline PackedShape check_packed(const Checker& check, const Tensor& w, const char* name, ScalarType dtype,
                                const char* spec, int64_t out, int64_t in) {
  if (!has_packed_linear())
    fail(check.op, "this torch was built without oneDNN: it has no packed weights (aoti_torch_cpu__linear_pointwise)");
  check.dtype(w, name, dtype);
  static const int32_t packed = aoti_torch_layout__mkldnn();
  int32_t layout = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(w.get(), &layout));
  if (layout != packed)
    fail_must_be(check.op, name, "packed by oneDNN (torch.ops.mkldnn._reorder_linear_weight)", "an ordinary tensor");
  check.shape(w, name, spec, {out, in});
  return {w.size(0), w.size(1)};
}

// After check_packed. x: [M, K], M >= 1, dense. -> [M, N], dense
inline Tensor packed_linear(const Tensor& x, const Tensor& w) {
  AtenTensorHandle y = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu__linear_pointwise(x.get(), w.get(), nullptr, "none", nullptr, 0, nullptr, &y));
  return Tensor(y);
}

}  // namespace unmask::cpu
