// What plans need to know of the current device: asked once, then four ints of a table.
#pragma once
#include <atomic>

#include "cuda/common/stream.h"

namespace unmask::cuda {

struct DeviceFacts {
  int multiprocessors, shared_per_block, shared_per_multiprocessor;  // bytes; per block: the most one may ask for
  int major;  // of the compute capability

  // A slice of a device with few multiprocessors may not hold a whole cluster of 8.
  bool has_clusters() const { return major >= 9 && multiprocessors >= 16; }
#if defined(UNMASK_WITH_SM90A)
  bool has_hopper_kernels() const { return major == 9; }
#else
  bool has_hopper_kernels() const { return false; }
#endif
};

inline DeviceFacts current_device(const Launch& launch) {
  constexpr int kMost = 64;
  static std::atomic<int> known[kMost][4];
  static constexpr cudaDeviceAttr kAsked[4] = {cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                               cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                                               cudaDevAttrComputeCapabilityMajor};
  int device = 0, value[4];
  launch.check(cudaGetDevice(&device));
  for (int i = 0; i < 4; ++i) {
    value[i] = device < kMost ? known[device][i].load(std::memory_order_relaxed) : 0;
    if (value[i] != 0) continue;
    launch.check(cudaDeviceGetAttribute(&value[i], kAsked[i], device));
    if (device < kMost) known[device][i].store(value[i], std::memory_order_relaxed);
  }
  return {value[0], value[1], value[2], value[3]};
}

// A launch whose blocks come in clusters of `cluster` (1: none).
template <class... Parameters, class... Arguments>
void launch_clusters(const Launch& launch, void (*kernel)(Parameters...), int64_t blocks, int threads,
                     int64_t shared_bytes, int64_t cluster, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = {static_cast<unsigned>(blocks), 1, 1};
  config.blockDim = {static_cast<unsigned>(threads), 1, 1};
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = launch.stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  launch.check(cudaLaunchKernelEx(&config, kernel, arguments...));
  launch.check();
}

}  // namespace unmask::cuda
