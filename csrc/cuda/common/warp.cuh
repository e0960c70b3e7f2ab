// The warp-wide and hardware operations that the kernels use, and nothing else of CUDA: tests/emulate_warp.h has the
// same names for the host, so that the kernels' own code runs, lane by lane, on a machine without a GPU. Every
// collective is taken by all 32 lanes.
#pragma once
#include <cstdint>

#include "common/noise.h"

#if !defined(UNMASK_EMULATE_WARP)

#define UNMASK_DEVICE __device__ __forceinline__
#define UNMASK_KERNEL_BOUNDS(threads, blocks) \
  __global__ void __launch_bounds__(threads, blocks)  // at least so many blocks an SM

namespace unmask::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

UNMASK_DEVICE int lane_id() { return static_cast<int>(threadIdx.x & 31u); }
UNMASK_DEVICE int warp_in_block() { return static_cast<int>(threadIdx.x >> 5); }
UNMASK_DEVICE int64_t block_index() { return blockIdx.x; }
UNMASK_DEVICE void warp_sync() { __syncwarp(); }
UNMASK_DEVICE void block_sync() { __syncthreads(); }
UNMASK_DEVICE char* dynamic_shared() {  // what the launch asked for, aligned as TMA's swizzle wants it
  extern __shared__ __align__(1024) char memory[];
  return memory;
}
// Clusters, sm_90 and later: a barrier of all their threads, and the place of a pointer into shared memory in another block.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
UNMASK_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}
UNMASK_DEVICE const char* cluster_shared(const char* mine, int rank) {
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(mine), "r"(rank));
  return reinterpret_cast<const char*>(there);
}
#else
constexpr bool kHasClusters = false;
UNMASK_DEVICE void cluster_sync() {}
UNMASK_DEVICE const char* cluster_shared(const char* mine, int) { return mine; }
#endif
UNMASK_DEVICE void device_fence() { __threadfence(); }
UNMASK_DEVICE uint32_t device_count_up(uint32_t* counter) { return atomicAdd(counter, 1u); }  // the count before
template <class T>
UNMASK_DEVICE T warp_get(T v, int lane) {
  return __shfl_sync(kAllLanes, v, lane);
}
template <class T>
UNMASK_DEVICE T warp_get_up(T v, int by) {
  return __shfl_up_sync(kAllLanes, v, by);
}
template <class T>
UNMASK_DEVICE T warp_get_xor(T v, int mask) {
  return __shfl_xor_sync(kAllLanes, v, mask);
}
UNMASK_DEVICE uint32_t warp_ballot(bool b) { return __ballot_sync(kAllLanes, b); }
UNMASK_DEVICE uint32_t warp_max_u32(uint32_t v) {
  return __reduce_max_sync(kAllLanes, v);
}  // sm_80 and later: one instruction
UNMASK_DEVICE uint32_t warp_min_u32(uint32_t v) { return __reduce_min_sync(kAllLanes, v); }
UNMASK_DEVICE uint32_t warp_or_u32(uint32_t v) { return __reduce_or_sync(kAllLanes, v); }
UNMASK_DEVICE void shared_or(uint32_t* word, uint32_t bits) { atomicOr(word, bits); }
UNMASK_DEVICE int bit_count(uint32_t v) { return __popc(v); }
UNMASK_DEVICE int lowest_bit(uint32_t v) { return __ffs(static_cast<int>(v)) - 1; }  // v != 0

// 16 bytes through the read-only path; p is 16-byte aligned.
struct alignas(16) Vec16 { uint32_t w[4]; };
UNMASK_DEVICE Vec16 load16(const void* p) {
  Vec16 v;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p));
  return v;
}

// The same for memory that this kernel writes.
UNMASK_DEVICE Vec16 load16_mutable(const void* p) { return *static_cast<const Vec16*>(p); }
UNMASK_DEVICE void store16(void* p, const Vec16& v) { *static_cast<Vec16*>(p) = v; }
UNMASK_DEVICE void store8(void* p, uint32_t low, uint32_t high) { *static_cast<uint2*>(p) = {low, high}; }

UNMASK_DEVICE float float_of_half(uint16_t h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
UNMASK_DEVICE uint16_t half_of_float(float v) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
}
UNMASK_DEVICE float exp2_approx(float y) {  // 2 ulp; results below 2^-126 become 0
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(y));
  return r;
}
UNMASK_DEVICE float max_drop_nan(float a, float b) { return fmaxf(a, b); }
UNMASK_DEVICE float max_keep_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

}  // namespace unmask::cuda

#endif

namespace unmask::cuda {

// Floats as unsigned integers in the same order (-0 below +0; no NaN).
UNMASK_DEVICE uint32_t ordered(float v) {
  const uint32_t u = bits_of_float(v);
  return (u & 0x80000000u) != 0 ? ~u : u | 0x80000000u;
}
UNMASK_DEVICE float of_ordered(uint32_t u) { return float_of_bits((u & 0x80000000u) != 0 ? u & 0x7FFFFFFFu : ~u); }

UNMASK_DEVICE float warp_max(float v) { return of_ordered(warp_max_u32(ordered(v))); }

// The same bits in every lane: both sides of each exchange add the same two numbers.
UNMASK_DEVICE float warp_sum(float v) {
  for (int mask = 16; mask > 0; mask >>= 1) v = v + warp_get_xor(v, mask);
  return v;
}

// Of this lane and those before it.
template <class T>
UNMASK_DEVICE T prefix_max(T v) {
  for (int by = 1; by < 32; by <<= 1) {
    const T other = warp_get_up(v, by);
    if (lane_id() >= by && other > v) v = other;
  }
  return v;
}

}  // namespace unmask::cuda
