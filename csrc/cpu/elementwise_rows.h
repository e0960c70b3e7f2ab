// Row arithmetic shared by the norm kernels of this folder (per ISA, included by kernel files only).
#pragma once
#include "cpu/vec.h"

namespace unmask::cpu::UNMASK_ISA_NS {

// 1 / sqrt(mean(x^2) + eps) in fp32. The order of the sum depends on n alone, so a row gives the same bits in any batch.
template <class T>
UNMASK_INLINE float inverse_rms(const T* x, int64_t n, float eps) {
  vf a0 = vset(0.0f), a1 = a0, a2 = a0, a3 = a0;
  int64_t i = 0;
  for (; i + 4 * kW <= n; i += 4 * kW) {
    const vf x0 = vload(x + i), x1 = vload(x + i + kW), x2 = vload(x + i + 2 * kW), x3 = vload(x + i + 3 * kW);
    a0 = vfma(x0, x0, a0);
    a1 = vfma(x1, x1, a1);
    a2 = vfma(x2, x2, a2);
    a3 = vfma(x3, x3, a3);
  }
  for (; i + kW <= n; i += kW) {
    const vf v = vload(x + i);
    a0 = vfma(v, v, a0);
  }
  if (i < n) {
    const vf v = vload_n(x + i, static_cast<int>(n - i), 0.0f);
    a1 = vfma(v, v, a1);
  }
  const float sum = vreduce_add(vadd(vadd(a0, a1), vadd(a2, a3)));
  return 1.0f / __builtin_sqrtf(sum / static_cast<float>(n) + eps);
}

// The order of LLaDA's and Hugging Face's RMSNorm: x * scale rounded to the dtype, then times weight (the store rounds again).
template <class T>
UNMASK_INLINE vf normed(vf x, vf weight, vf scale) {
  return vmul(vround(vmul(x, scale), static_cast<const T*>(nullptr)), weight);
}

}  // namespace unmask::cpu::UNMASK_ISA_NS
