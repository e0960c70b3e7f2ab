// Which instruction set the CPU kernels use. Chosen once, at the first call; UNMASK_ISA=portable|avx2|avx512|avx512bf16 forces one
// (an unknown name, or one that this CPU lacks, is an error that names the valid ones).
//
// A kernel lives in csrc/cpu/kernels/<op>.cpp inside `namespace unmask::cpu::UNMASK_ISA_NS`, compiled once per ISA, and is declared for
// all of them by UNMASK_DECLARE_KERNEL in <op>_kernels.h. UNMASK_KERNEL(fn) is the pointer for the ISA in use.
#pragma once
#include <cstdint>

namespace unmask::cpu {

enum class Isa : int64_t { portable = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

Isa isa();  // the one in use; throws on a bad UNMASK_ISA
Isa best_isa();  // the best this CPU can run
const char* isa_name(Isa);

}  // namespace unmask::cpu

#if defined(UNMASK_X86) || defined(__x86_64__)
#define UNMASK_DECLARE_KERNEL(RET, NAME, ...) \
  namespace unmask::cpu::portable {           \
  RET NAME(__VA_ARGS__);                      \
  }                                           \
  namespace unmask::cpu::avx2 {               \
  RET NAME(__VA_ARGS__);                      \
  }                                           \
  namespace unmask::cpu::avx512 {             \
  RET NAME(__VA_ARGS__);                      \
  }                                           \
  namespace unmask::cpu::avx512bf16 {         \
  RET NAME(__VA_ARGS__);                      \
  }
#define UNMASK_KERNEL(NAME)                                                                  \
  (::unmask::cpu::isa() == ::unmask::cpu::Isa::avx512bf16 ? &::unmask::cpu::avx512bf16::NAME \
   : ::unmask::cpu::isa() == ::unmask::cpu::Isa::avx512   ? &::unmask::cpu::avx512::NAME     \
   : ::unmask::cpu::isa() == ::unmask::cpu::Isa::avx2     ? &::unmask::cpu::avx2::NAME       \
                                                          : &::unmask::cpu::portable::NAME)
#else
#define UNMASK_DECLARE_KERNEL(RET, NAME, ...) \
  namespace unmask::cpu::portable {           \
  RET NAME(__VA_ARGS__);                      \
  }
#define UNMASK_KERNEL(NAME) (::unmask::cpu::isa(), &::unmask::cpu::portable::NAME)
#endif
