// 2^x to two units in the last place; what is below 2^-126 is 0.
#pragma once

namespace int8_ops::ptx {

// PTX ISA, "Floating Point Instructions: ex2.approx.ftz.f32".
__device__ __forceinline__ float ex2_approx(float x) {
  float y = 0.0F;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace int8_ops::ptx
