// Tensor maps for TMA, made on the host by the driver. The driver is asked for the function, so that the library needs no libcuda to load.
#pragma once
#include <string>

#include <cuda.h>

#include "cuda/common/stream.h"

namespace unmask::cuda {

// A map of 16-bit elements with `rank` dimensions, innermost first and dense, in boxes of 64 x 64 elements of the two innermost ones (then
// 1), 128-byte swizzle; outside of the tensor a box reads zeros. stride: of dimensions 1 .. rank - 1, in elements.
inline CUtensorMap make_tensor_map(const Launch& launch, const char* name, const void* data, bool bf16, int rank,
                                   const int64_t* size, const int64_t* stride, int box_rows = 64) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [&]() -> Encode {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    launch.check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess || found == nullptr)
      launch.refuse("the NVIDIA driver offers no cuTensorMapEncodeTiled; a driver for CUDA 12 or later has it");
    return reinterpret_cast<Encode>(found);
  }();
  cuuint64_t sizes[5], strides[4];
  cuuint32_t box[5], step[5];
  for (int d = 0; d < rank; ++d) {
    sizes[d] = static_cast<cuuint64_t>(size[d]);
    box[d] = d == 0 ? 64u : d == 1 ? static_cast<cuuint32_t>(box_rows) : 1u;
    step[d] = 1;
    // of a dimension of one element the stride is never used, but must still be a valid one
    if (d > 0) strides[d - 1] = static_cast<cuuint64_t>(size[d] > 1 ? stride[d - 1] * 2 : 16);
  }
  CUtensorMap map;
  const CUresult error = encode(&map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                static_cast<cuuint32_t>(rank), const_cast<void*>(data), sizes, strides, box, step,
                                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS)
    launch.refuse(std::string("the driver made no tensor map of ") + name + " (CUresult " +
                  std::to_string(static_cast<int>(error)) + ")");
  return map;
}

}  // namespace unmask::cuda
