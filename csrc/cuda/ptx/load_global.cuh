// Loads from global memory that are not put off until their value is needed, and prefetches.
// PTX ISA, "Data Movement and Conversion Instructions: ld.global.nc, prefetch".
#pragma once

#include <cstdint>

namespace int8_ops::ptx {

// PTX ISA: ld.global.nc.
__device__ __forceinline__ uint32_t ld_global_nc_32(const void* from) {
  uint32_t d;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(d) : "l"(from));
  return d;
}
__device__ __forceinline__ uint32_t ld_global_nc_16(const void* from) {
  uint16_t d;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(d) : "l"(from));
  return d;
}

// Fetches the line of an address into L2.
// PTX ISA: prefetch.global.L2.
__device__ __forceinline__ void prefetch_global_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory");
}
// What is loaded soon and has no register yet. PTX ISA: prefetch.global.L1.
__device__ __forceinline__ void prefetch_global_l1(const void* from) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(from));
}

}  // namespace int8_ops::ptx
