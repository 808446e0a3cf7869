// Counters in global memory, by which blocks of one grid tell each other what is done; sm_70 and
// up. PTX ISA, "Memory Consistency Model"; "ld", "red".
#pragma once

#include <cstdint>

namespace int8_ops::ptx {

// What was written before the count was raised is visible after.
// PTX ISA: ld.acquire.gpu.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* counter) {
  uint32_t value = 0;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// PTX ISA: red.release.gpu.add.
__device__ __forceinline__ void add_release(uint32_t* counter, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// The count before. PTX ISA: atom.relaxed.gpu.add.
__device__ __forceinline__ uint32_t fetch_add(uint32_t* counter, uint32_t value) {
  uint32_t before = 0;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
}

}  // namespace int8_ops::ptx
