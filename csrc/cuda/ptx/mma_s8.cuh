// Tensor-core products of int8 on one warp.
// PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions".
#pragma once

#include <cstdint>

namespace int8_ops::ptx {

// d += a * b, a int8 [16, 32] by rows, b int8 [32, 8] by columns, d int32 [16, 8]. Wraps on
// overflow; K <= kMaxK keeps every sum in range.
// PTX ISA: mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32.
__device__ __forceinline__ void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4],
                                                uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace int8_ops::ptx
