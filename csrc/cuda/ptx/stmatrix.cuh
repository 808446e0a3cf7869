// A warp's fragments to shared memory, sm_90.
// PTX ISA, "Warp Level Matrix Store Instructions: stmatrix".
#pragma once

#include <cstdint>

namespace int8_ops::ptx {

// Four 8 x 8 matrices of 16-bit elements: lane 8 i + j names row j of matrix i; lane 4 r + c gives
// elements 2 c and 2 c + 1 of row r of every matrix.
// PTX ISA: stmatrix.sync.aligned.m8n8.x4.shared.b16.
__device__ __forceinline__ void stmatrix_x4(uint32_t shared, const uint32_t (&d)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
               "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3])
               : "memory");
}

// The same transposed: lane 8 i + j names row j of matrix i; lane 4 c + r gives elements 2 r and
// 2 r + 1 of column c of every matrix.
// PTX ISA: stmatrix.sync.aligned.m8n8.x4.trans.shared.b16.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t shared, const uint32_t (&d)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
      "r"(d[0]), "r"(d[1]), "r"(d[2]), "r"(d[3])
      : "memory");
}

}  // namespace int8_ops::ptx
