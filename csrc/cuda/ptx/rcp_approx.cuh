// The reciprocal to within one unit in the last place.
// PTX ISA: rcp.approx.ftz.f32.
#pragma once

namespace int8_ops::ptx {

__device__ __forceinline__ float rcp_approx(float x) {
  float d;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}

}  // namespace int8_ops::ptx
