#include "cpu/isa.h"

#include <cstdlib>
#include <string>

#include <torch/headeronly/util/Exception.h>

namespace unmask::cpu {

const char* isa_name(Isa i) {
  switch (i) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512bf16: return "avx512bf16";
  }
  return "unknown";
}

Isa best_isa() {
#if defined(UNMASK_X86)
  static const Isa best = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(UNMASK_EMULATE_BF16)
    const bool bf16 = avx512;
#else
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    return bf16 ? Isa::avx512bf16 : avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
  }();
  return best;
#else
  return Isa::portable;
#endif
}

Isa isa() {
  static const Isa chosen = [] {
    const char* forced = std::getenv("UNMASK_ISA");
    if (forced == nullptr || *forced == '\0') return best_isa();
    std::string valid;
    for (int64_t i = 0; i <= static_cast<int64_t>(best_isa()); ++i) {
      if (std::string(forced) == isa_name(static_cast<Isa>(i))) return static_cast<Isa>(i);
      valid += (i ? ", " : "") + std::string(isa_name(static_cast<Isa>(i)));
    }
    STD_TORCH_CHECK(false, "UNMASK_ISA must be one of ", valid, " on this CPU, got ", forced,
                    "; unset it to let unmask choose");
    return Isa::portable;
  }();
  return chosen;
}

}  // namespace unmask::cpu
