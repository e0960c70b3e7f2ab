// Hopper only (sm_90a): barriers in shared memory that count bytes, tiles copied by the tensor memory accelerator (TMA), and the products
// of a warpgroup (4 warps) on them. tests/emulate_hopper.h has the same names for the host.
//
// A tile in shared memory: rows of 64 16-bit elements (128 bytes) at a multiple of 1,024 bytes, 16-byte chunk c of row r at place c ^ (r % 8)
// ("128-byte swizzle": what TMA writes and wgmma reads without bank conflicts). A product reads it
//   K-major   rows are the M or N of the product, elements its K: K of attention, weights, tokens
//   MN-major  rows are its K, elements its N: V of attention; wider N = further tiles, one after the other
// Sources: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions" (matrix descriptors, fragments) and "Tensors".
#pragma once
#include "cuda/common/tensor_core.cuh"

namespace unmask::cuda {

constexpr int kAtomRow = 128;  // bytes of a tile's row
constexpr int kAtomElements = 64;
constexpr int kWarpgroupThreads = 128;

// Byte of element (row, column) in a tile.
UNMASK_HD int swizzled(int row, int column) {
  return row * kAtomRow + ((column >> 3 ^ (row & 7)) << 4) + (column & 7) * 2;
}

// Matrix descriptor: start (18 bits, 16-byte units), leading and stride offsets (16-byte units), 128-byte swizzle.
//   K-major: the stride goes from 8 rows to the next 8; the leading offset is not read. The next 16 elements of K: start + 32 bytes.
//   MN-major: the stride goes from 8 rows (of K) to the next 8, the leading offset from one tile (64 of N) to the next.
UNMASK_HD uint64_t matrix_descriptor(uint32_t start, uint32_t leading_bytes) {
  return (uint64_t{start} & 0x3FFFF) >> 4 | uint64_t{leading_bytes >> 4} << 16 | uint64_t{8 * kAtomRow >> 4} << 32 |
         uint64_t{1} << 62;
}

// A place in a ring of shared-memory slots. Producer and consumers each walk their own; `phase` tells this round from the one before.
struct RingPlace {
  int slot = 0;
  uint32_t phase = 0;
  UNMASK_HD void advance(int slots) {
    if (++slot == slots) slot = 0, phase ^= 1u;
  }
};

}  // namespace unmask::cuda

#if !defined(UNMASK_EMULATE_WARP)
#include <cuda.h>

namespace unmask::cuda {

using TensorMap = CUtensorMap;
#define UNMASK_GRID_CONSTANT __grid_constant__

// ---- barriers -----------------------------------------------------------------------------------------------------
// `arrivals` arrivals and all bytes that were announced complete a phase.
UNMASK_DEVICE void barrier_init(uint64_t* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// After barrier_init and before the block's barrier: TMA sees the barriers too.
UNMASK_DEVICE void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}
UNMASK_DEVICE void barrier_arrive(uint64_t* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
UNMASK_DEVICE void barrier_arrive_expecting(uint64_t* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity is complete. A fresh barrier counts the phase before its first (parity 1) as complete.
UNMASK_DEVICE void barrier_wait(uint64_t* b, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t}" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
}
// Of `threads` threads that name the same hardware barrier (1 to 15; 0 is block_sync): waits for all, true if any said so.
UNMASK_DEVICE bool group_any(int barrier, int threads, bool mine) {
  uint32_t any;
  asm volatile(
      "{\n\t.reg .pred p, q;\n\t"
      "setp.ne.u32 p, %3, 0;\n\t"
      "barrier.cta.red.or.aligned.pred q, %1, %2, p;\n\t"
      "selp.u32 %0, 1, 0, q;\n\t}"
      : "=r"(any)
      : "r"(barrier), "r"(threads), "r"(mine ? 1u : 0u)
      : "memory");
  return any != 0;
}
// Ordinary stores to shared memory before, products and TMA after (a barrier of the threads follows).
UNMASK_DEVICE void fence_for_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- copies -------------------------------------------------------------------------------------------------------
UNMASK_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// The box of `map` at these coordinates (innermost first; outside of the tensor: zeros) to a tile, counted by `b`. One thread calls it.
UNMASK_DEVICE void copy_box(void* to, const TensorMap* map, int c0, int c1, int c2, int c3, uint64_t* b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(b)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
UNMASK_DEVICE void copy_box(void* to, const TensorMap* map, int c0, int c1, uint64_t* b) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(b)), "r"(c0), "r"(c1)
      : "memory");
}

// ---- products of a warpgroup --------------------------------------------------------------------------------------
// Registers that products read or write were written by ordinary instructions before.
UNMASK_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
UNMASK_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending groups are on their way. The results of the others are in their registers: pass those through settled().
template <int kPending>
UNMASK_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of these registers across a wait, or what ordinary instructions do to them past products_begin().
template <int kBlocks>
UNMASK_DEVICE void settled(float (&c)[kBlocks][4]) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n)
    asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
}

template <int kBlocks>
UNMASK_DEVICE void settled(uint32_t (&a)[kBlocks][2]) {
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1])::"memory");
}

// C [64 x kN] (+)= A [64 x 16] B [16 x kN]: warp w of the group holds rows 16 w .. 16 w + 15 of A and C, as fragments of m16n8k16. A in
// registers; B by descriptor, MN-major if kTransposed.
#define UNMASK_C4(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define UNMASK_C16(n) UNMASK_C4(n), UNMASK_C4(n + 1), UNMASK_C4(n + 2), UNMASK_C4(n + 3)
#define UNMASK_D16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define UNMASK_D32 UNMASK_D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define UNMASK_D64                                                                                    \
  UNMASK_D32                                                                                          \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define UNMASK_PRODUCT_RS(shape, type, d, a0, a1, a2, a3, desc, use, trans, operands)                               \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " use                                                          \
               ", 0;\n\t"                                                                                           \
               "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" d "}, {" a0 ", " a1 ", " a2 ", " a3 \
               "}, " desc ", p, 1, 1, " trans ";\n\t}"                                                              \
               : operands                                                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate ? 1 : 0),                       \
                 "n"(kTransposed ? 1 : 0))
#define UNMASK_COMMA ,

template <FloatType kType, bool kTransposed>
UNMASK_DEVICE void product(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(kType != FloatType::f32);
  if constexpr (kType == FloatType::bf16)
    UNMASK_PRODUCT_RS("m64n64k16", "bf16", UNMASK_D32, "%32", "%33", "%34", "%35", "%36", "%37", "%38",
                      UNMASK_C16(0) UNMASK_COMMA UNMASK_C16(4));
  else
    UNMASK_PRODUCT_RS("m64n64k16", "f16", UNMASK_D32, "%32", "%33", "%34", "%35", "%36", "%37", "%38",
                      UNMASK_C16(0) UNMASK_COMMA UNMASK_C16(4));
}
template <FloatType kType, bool kTransposed>
UNMASK_DEVICE void product(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(kType != FloatType::f32);
  if constexpr (kType == FloatType::bf16)
    UNMASK_PRODUCT_RS("m64n128k16", "bf16", UNMASK_D64, "%64", "%65", "%66", "%67", "%68", "%69", "%70",
                      UNMASK_C16(0) UNMASK_COMMA UNMASK_C16(4) UNMASK_COMMA UNMASK_C16(8) UNMASK_COMMA UNMASK_C16(12));
  else
    UNMASK_PRODUCT_RS("m64n128k16", "f16", UNMASK_D64, "%64", "%65", "%66", "%67", "%68", "%69", "%70",
                      UNMASK_C16(0) UNMASK_COMMA UNMASK_C16(4) UNMASK_COMMA UNMASK_C16(8) UNMASK_COMMA UNMASK_C16(12));
}

// A and B by descriptor, both K-major.
#define UNMASK_PRODUCT_SS(shape, type, d, a, b_, use, operands)                                   \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " use                                        \
               ", 0;\n\t"                                                                         \
               "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" d "}, " a ", " b_ \
               ", p, 1, 1, 0, 0;\n\t}"                                                            \
               : operands                                                                         \
               : "l"(a_desc), "l"(b_desc), "r"(accumulate ? 1 : 0))

template <FloatType kType>
UNMASK_DEVICE void product(float (&c)[4][4], uint64_t a_desc, uint64_t b_desc, bool accumulate) {
  if constexpr (kType == FloatType::bf16)
    UNMASK_PRODUCT_SS("m64n32k16", "bf16", UNMASK_D16, "%16", "%17", "%18", UNMASK_C16(0));
  else UNMASK_PRODUCT_SS("m64n32k16", "f16", UNMASK_D16, "%16", "%17", "%18", UNMASK_C16(0));
}
template <FloatType kType>
UNMASK_DEVICE void product(float (&c)[8][4], uint64_t a_desc, uint64_t b_desc, bool accumulate) {
  if constexpr (kType == FloatType::bf16)
    UNMASK_PRODUCT_SS("m64n64k16", "bf16", UNMASK_D32, "%32", "%33", "%34", UNMASK_C16(0) UNMASK_COMMA UNMASK_C16(4));
  else UNMASK_PRODUCT_SS("m64n64k16", "f16", UNMASK_D32, "%32", "%33", "%34", UNMASK_C16(0) UNMASK_COMMA UNMASK_C16(4));
}

}  // namespace unmask::cuda

#undef UNMASK_C4
#undef UNMASK_C16
#undef UNMASK_D16
#undef UNMASK_D32
#undef UNMASK_D64
#undef UNMASK_PRODUCT_RS
#undef UNMASK_PRODUCT_SS
#undef UNMASK_COMMA

#endif
