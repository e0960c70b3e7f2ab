// Tensor cores and asynchronous copies of sm_80 and later: the four instructions that a tile kernel needs. tests/emulate_tensor_core.h has
// the same names for the host. Fragments of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"), g = lane / 4, t = lane % 4:
//   A [16 x 16]  a0: row g, columns 2t, 2t+1; a1: row g+8; a2: row g, columns 2t+8, 2t+9; a3: row g+8, those columns
//   B [16 x 8]   b0: rows 2t, 2t+1 of column g; b1: rows 2t+8, 2t+9
//   C [16 x 8]   c0, c1: row g, columns 2t, 2t+1; c2, c3: row g+8
#pragma once
#include "cuda/common/elements.cuh"

#if !defined(UNMASK_EMULATE_WARP)

namespace unmask::cuda {

UNMASK_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// c += A B
template <FloatType kType>
UNMASK_DEVICE void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kType == FloatType::bf16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory; lane l gives the address of row l % 8 of matrix l / 8, and gets of matrix i
// the two elements of row l / 4, columns 2 (l % 4), in r[i]. Transposed: of column l / 4, rows 2 (l % 4).
UNMASK_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
UNMASK_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes from global to shared memory, past L1; zeros where `read` is false (`from` is then not read). Both are 16-byte aligned.
UNMASK_DEVICE void copy_async_16(void* to, const void* from, bool read) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(read ? 16 : 0)
               : "memory");
}
UNMASK_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's groups are on their way; other threads see the data after a block_sync.
template <int kPending>
UNMASK_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Two floats as neighbouring 16-bit elements, the first one low.
template <FloatType kType>
UNMASK_DEVICE uint32_t packed_pair(float low, float high) {
  uint32_t r;
  if constexpr (kType == FloatType::bf16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

}  // namespace unmask::cuda

#endif
