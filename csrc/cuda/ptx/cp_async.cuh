// Asynchronous copies from global to shared memory, sm_80 and up.
// PTX ISA, "Data Movement and Conversion Instructions: cp.async".
#pragma once

#include <cstdint>

namespace int8_ops::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Hides where a value came from, so that the compiler keeps it instead of computing it again.
template <typename T>
__device__ __forceinline__ void keep_in_register(T*& pointer) {
  asm volatile("" : "+l"(pointer));
}
__device__ __forceinline__ void keep_in_register(uint32_t& value) {
  asm volatile("" : "+r"(value));
}

// Copies 16 bytes, of which the last 16 - source_bytes arrive as zeros. With source_bytes == 0
// nothing is read, but the pointer must still be one the thread may form.
// PTX ISA: cp.async.cg.shared.global, with src-size.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global,
                                            int32_t source_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared),
               "l"(global), "r"(source_bytes)
               : "memory");
}

// The same for data of which neighbours follow: L2 fetches 256 bytes.
__device__ __forceinline__ void cp_async_16_far(uint32_t shared, const void* global,
                                                int32_t source_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;\n" ::"r"(shared),
               "l"(global), "r"(source_bytes)
               : "memory");
}

// Copies 4 bytes.
// PTX ISA: cp.async.ca.shared.global.
__device__ __forceinline__ void cp_async_4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}

// PTX ISA: cp.async.commit_group.
__device__ __forceinline__ void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most kPending of the newest groups are still under way.
// PTX ISA: cp.async.wait_group.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace int8_ops::ptx
