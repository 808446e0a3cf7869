// Loads of matrices from shared memory, by one warp: what tensor cores are fed with.
// PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions: ldmatrix".
#pragma once

#include <cstdint>

namespace int8_ops::ptx {

// Four 8 x 8 matrices of 16-bit elements, here rows of 16 int8 each: lane 8i + j names row j of
// matrix i; lane 4r + c receives bytes 4c .. 4c+3 of row r of every matrix.
// PTX ISA: ldmatrix.sync.aligned.m8n8.x4.shared.b16.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared)
               : "memory");
}

// The same transposed: lane 4 r + c receives elements r of rows 2 c and 2 c + 1 of every matrix.
// PTX ISA: ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared)
               : "memory");
}

}  // namespace int8_ops::ptx
