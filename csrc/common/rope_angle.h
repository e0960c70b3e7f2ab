// cos and sin of RoPE's angles, the same bits on every backend.
#pragma once
#include "common/noise.h"  // UNMASK_HD, bits of floats

namespace unmask {

constexpr uint32_t kHugeAngle =
    0x4D800000u;  // 2^28 as fp32 bits: from here on (infinite and NaN too) quarter_turns is not exact

struct CosSin { float c, s; };

// The angle a (exact in double) minus q = round(a 2/pi) quarter turns, pi/2 cut in three: the first two parts have 24 bits, so with
// |q| < 2^29 their products and differences are exact, and the error left is about 2^-52. Then Taylor on |r| <= pi/4 (sin to
// r^11, cos to r^12: 3e-12 and 4e-13 relative) and one rounding to fp32. Plain multiplies and adds: every backend gives the same bits.
UNMASK_HD CosSin cos_sin_below_huge(float angle) {
  constexpr double kMagic = 0x1.8p52;  // adding it leaves round-to-nearest(q) in the low bits
  const double a = static_cast<double>(angle);
  const double shifted = a * 0x1.45f306dc9c883p-1 + kMagic;
  const double q = shifted - kMagic;
  const double r = ((a - q * 0x1.921fb6p0) - q * -0x1.777a5cp-25) - q * -0x1.ee59d9cceba40p-50;
  const double z = r * r;
  double s = -1.0 / 39916800.0;
  s = s * z + 1.0 / 362880.0;
  s = s * z - 1.0 / 5040.0;
  s = s * z + 1.0 / 120.0;
  s = s * z - 1.0 / 6.0;
  s = r + r * (z * s);
  double c = 1.0 / 479001600.0;
  c = c * z - 1.0 / 3628800.0;
  c = c * z + 1.0 / 40320.0;
  c = c * z - 1.0 / 720.0;
  c = c * z + 1.0 / 24.0;
  c = c * z - 0.5;
  c = 1.0 + z * c;
  // quarter turn 0: (c, s), 1: (-s, c), 2: (-c, -s), 3: (s, -c)
  const uint64_t turn = bits_of_double(shifted), sb = bits_of_double(s), cb = bits_of_double(c);
  const uint64_t swap = (0 - (turn & 1)) & (sb ^ cb);
  const uint64_t so = (sb ^ swap) ^ ((turn & 2) << 62), co = (cb ^ swap) ^ (((turn + 1) & 2) << 62);
  return {static_cast<float>(double_of_bits(co)), static_cast<float>(double_of_bits(so))};
}

}  // namespace unmask
