// Elements of the three floating types: as they lie in memory, as fp32, and eight neighbours at a time.
#pragma once
#include "common/float_type.h"
#include "common/online.h"
#include "cuda/common/warp.cuh"

namespace unmask::cuda {

constexpr int kRun = 8;  // neighbouring elements that one lane takes: 16 or 32 bytes

template <FloatType> struct Element;
template <> struct Element<FloatType::f32> {
  using Bits = uint32_t;
  static constexpr Bits kNegInf = 0xFF800000u;
  static UNMASK_DEVICE float value(Bits b) { return float_of_bits(b); }
  static UNMASK_DEVICE Bits bits(float v) { return bits_of_float(v); }
};
template <> struct Element<FloatType::bf16> {
  using Bits = uint16_t;
  static constexpr Bits kNegInf = 0xFF80u;
  static UNMASK_DEVICE float value(Bits b) { return float_of_bits(static_cast<uint32_t>(b) << 16); }
  static UNMASK_DEVICE Bits bits(float v) {  // to nearest even; subnormals stay, NaN stays one
    const uint32_t u = bits_of_float(v);
    if ((u & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<Bits>(u >> 16 | 0x40u);
    return static_cast<Bits>((u + 0x7FFFu + (u >> 16 & 1u)) >> 16);
  }
};
template <> struct Element<FloatType::f16> {
  using Bits = uint16_t;
  static constexpr Bits kNegInf = 0xFC00u;
  static UNMASK_DEVICE float value(Bits b) { return float_of_half(b); }
  static UNMASK_DEVICE Bits bits(float v) { return half_of_float(v); }
};

template <FloatType kType>
UNMASK_DEVICE float rounded(float v) {
  return Element<kType>::value(Element<kType>::bits(v));
}

// kRun neighbouring elements as they lie in memory.
template <FloatType kType>
struct Run {
  using Bits = typename Element<kType>::Bits;
  static constexpr int kVecs = static_cast<int>(sizeof(Bits)) * kRun / 16;
  Vec16 v[kVecs];

  UNMASK_DEVICE float get(int k) const {
    if constexpr (kType == FloatType::f32) return Element<kType>::value(v[k / 4].w[k % 4]);
    else return Element<kType>::value(static_cast<Bits>(v[0].w[k / 2] >> (k % 2 * 16)));
  }
  UNMASK_DEVICE void set(int k, float value) {
    const uint32_t bits = Element<kType>::bits(value);
    if constexpr (kType == FloatType::f32) v[k / 4].w[k % 4] = bits;
    else if (k % 2 == 0) v[0].w[k / 2] = bits;
    else v[0].w[k / 2] |= bits << 16;  // after its even neighbour
  }

  // At p, which is 16-byte aligned: through the read-only path, or with ordinary loads of memory that this kernel writes.
  UNMASK_DEVICE void load_constant(const Bits* p) {
#pragma unroll
    for (int q = 0; q < kVecs; ++q) v[q] = load16(p + q * (kRun / kVecs));
  }
  UNMASK_DEVICE void load(const Bits* p) {
#pragma unroll
    for (int q = 0; q < kVecs; ++q) v[q] = load16_mutable(p + q * (kRun / kVecs));
  }
  UNMASK_DEVICE void store(Bits* p) const {
#pragma unroll
    for (int q = 0; q < kVecs; ++q) store16(p + q * (kRun / kVecs), v[q]);
  }
};

}  // namespace unmask::cuda
