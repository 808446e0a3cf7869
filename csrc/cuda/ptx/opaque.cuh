// A value that the compiler must take as it comes.
#pragma once

#include <cstdint>

namespace int8_ops::ptx {

// What follows from `value` is computed after this, and not before a loop and then held in
// registers. No instruction.
__device__ __forceinline__ void make_opaque(int32_t& value) { asm volatile("" : "+r"(value)); }

// This thread's number in its warp, asked for anew: no register holds it meanwhile.
__device__ __forceinline__ uint32_t lane_number() {
  uint32_t lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// The same of several, at this place among the other volatile statements.
template <int kCount>
__device__ __forceinline__ void touch(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// to = from, in another register and at this place among the other volatile statements.
__device__ __forceinline__ void move(float& to, float from) {
  asm volatile("mov.b32 %0, %1;" : "=f"(to) : "f"(from) : "memory");
}

}  // namespace int8_ops::ptx
