// Host side of every CUDA launcher: the device and stream that torch is using now, and the check after a launch.
//
// The stream comes from a weak symbol. It lives in libtorch_cuda, which a CPU build of torch lacks: a strong reference
// would make the library unloadable there, and the CPU ops of one binary must work with every torch. libtorch.so in
// DT_NEEDED (CMake) is what makes it resolve on a CUDA build, because torch loads its own libraries with RTLD_LOCAL.
// Never fall back to the default stream: that would race with the kernels torch has queued.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>

#include "common/check.h"

extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace unmask::cuda {

// Makes the device of `tensor` current for the lifetime of the object; `stream` is torch's current stream there.
class Launch {
 public:
  Launch(const char* op, const Tensor& tensor) : op_(op), guard_(tensor.get_device_index()) {
    if (aoti_torch_get_current_cuda_stream == nullptr)
      fail(op,
           "a CUDA tensor needs a CUDA build of torch: this process has none (aoti_torch_get_current_cuda_stream is "
           "missing)");
    void* handle = nullptr;
    if (aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &handle) != 0)
      fail(op, "torch gave no current stream for cuda:" + std::to_string(tensor.get_device_index()));
    stream = static_cast<cudaStream_t>(handle);
  }

  // After each <<<>>>: a bad configuration, or an error that an earlier kernel left, under the op's name. No
  // synchronisation.
  void check() const { check(cudaGetLastError()); }
  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // it would else be reported once more, by whichever op comes next
    fail(op_, std::string("CUDA launch failed: ") + cudaGetErrorString(error));
  }
  [[noreturn]] void refuse(const std::string& why) const { fail(op_, why); }

  cudaStream_t stream = nullptr;

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace unmask::cuda
