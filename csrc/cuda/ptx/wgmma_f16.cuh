// Tensor-core products of float16 on one warpgroup, sm_90a: a from registers, b from shared memory,
// sums float32 in registers, asynchronous; with the fences and groups of wgmma_s8.cuh.
// PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions: wgmma".
#pragma once

#include <cstdint>

namespace int8_ops::ptx {

// d (+)= a * b: a [64, 16] in registers, of the 16 rows of a warp those that mma.sync's m16n8k16
// has: thread 32 w + 4 g + t holds in a[2 c + h] row 16 w + g + 8 h, columns 8 c + 2 t and + 1.
// b [16, 16] K-major in shared memory, described by wgmma_descriptor(). d [64, 16]: the thread
// holds in d[4 j + 2 h + e] row 16 w + g + 8 h, column 8 j + 2 t + e. a must stay as it is until
// the product is waited for. PTX ISA: wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16.
__device__ __forceinline__ void wgmma_f16(float (&d)[8], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7},"
      " {%8, %9, %10, %11}, %12, 1, 1, 1, 0;\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// The same with b [16, 8] and d [64, 8].
// PTX ISA: wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16.
__device__ __forceinline__ void wgmma_f16(float (&d)[4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3},"
      " {%4, %5, %6, %7}, %8, 1, 1, 1, 0;\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

}  // namespace int8_ops::ptx
