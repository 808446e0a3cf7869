// Maximum that keeps NaN. fmaxf drops it, and a dropped NaN is a wrong row that looks right.
// PTX ISA: max.NaN.f32, sm_80 and up.
#pragma once

namespace int8_ops::ptx {

__device__ __forceinline__ float max_nan_f32(float a, float b) {
  float d;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}

}  // namespace int8_ops::ptx
