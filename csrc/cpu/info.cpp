// info(what): run-time facts as integers, so that Python needs no second way into the library.
//   0  stable-ABI target as torch encodes it     1  ISA in use (Isa)        2  best ISA of this CPU
//   3  1 if CUDA kernels are compiled in         4  how many CUDA architectures   5+i  the i-th of them (90 for 90a)
//  -1  1 if the kernels for sm_90a alone are in (TMA and wgmma: block_attention, fused_head_stats)
//  -2  1 if this torch multiplies by oneDNN's packed weights (decoder_layer, head_stats)
#include <cstdlib>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/register.h"
#include "cpu/isa.h"
#include "cpu/packed_linear.h"

namespace unmask::cpu {
namespace {

std::vector<int64_t> cuda_archs() {
  std::vector<int64_t> out;
#if defined(UNMASK_WITH_CUDA)
  const std::string list = UNMASK_CUDA_ARCH_LIST;
  for (size_t i = 0; i < list.size();) {
    const size_t e = list.find(' ', i);
    out.push_back(std::strtoll(list.c_str() + i, nullptr, 10));
    if (e == std::string::npos) break;
    i = e + 1;
  }
#endif
  return out;
}

int64_t info(int64_t what) {
  static const std::vector<int64_t> archs = cuda_archs();
  switch (what) {
    case -2: return has_packed_linear() ? 1 : 0;
    case -1:
#if defined(UNMASK_WITH_SM90A)
      return 1;
#else
      return 0;
#endif
    case 0: return static_cast<int64_t>(TORCH_TARGET_VERSION);
    case 1: return static_cast<int64_t>(isa());
    case 2: return static_cast<int64_t>(best_isa());
    case 3: return archs.empty() ? 0 : 1;
    case 4: return static_cast<int64_t>(archs.size());
    default: break;
  }
  if (what >= 5 && what - 5 < static_cast<int64_t>(archs.size())) return archs[static_cast<size_t>(what - 5)];
  fail_must_be("info", "what", "-2 to " + std::to_string(4 + archs.size()), std::to_string(what));
}

}  // namespace
}  // namespace unmask::cpu

UNMASK_IMPL(CompositeExplicitAutograd, info, &unmask::cpu::info)
