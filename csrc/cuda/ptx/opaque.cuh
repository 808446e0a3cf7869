// A value that the compiler must take as it comes.
#pragma once

#include <cstdint>

namespace int8_ops::ptx {

// What follows from `value` is computed after this, and not before a loop and then held in
// registers. No instruction.
__device__ __forceinline__ void make_opaque(int32_t& value) { asm volatile("" : "+r"(value)); }

}  // namespace int8_ops::ptx
