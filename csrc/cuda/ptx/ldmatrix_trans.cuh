// Tensor-core products of float16 on one warp, and the transposing shared-memory load.
// PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions".
#pragma once

#include <cstdint>

namespace int8_ops::ptx {

// Four 8 x 8 matrices of 16-bit elements: lane 8 i + j names row j of matrix i; lane 4 r + c
// receives elements r of rows 2 c and 2 c + 1 of every matrix.
// PTX ISA: ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared)
               : "memory");
}

// d += a * b, a float16 [16, 16] by rows, b float16 [16, 8] by columns, d float32 [16, 8]. Lane
// 4 g + c holds in a[2 h + r] row g + 8 r, columns 8 h + 2 c and the next; in b0 rows 2 c and
// 2 c + 1 of column g, in b1 the rows eight below; in d[2 r + e] row g + 8 r, column 2 c + e.
// PTX ISA: mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32.
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace int8_ops::ptx
