// Loads of latents and of A's rows that may start at any byte, and int4 values out of bytes.
#pragma once

#include <cstdint>

namespace int8_ops::cuda::attention {

// kWords words from `from`, of which `valid` bytes are there (it may be none, or negative); zeros
// for the rest. With `wide` the address is aligned to them and all bytes are there, or none.
template <int kWords>
__device__ __forceinline__ void load_bytes(const int8_t* from, int32_t valid, bool wide,
                                           uint32_t (&words)[kWords]) {
  static_assert(kWords == 1 || kWords == 4);
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = 0;
  if (valid <= 0) return;
  if (wide) {
    if constexpr (kWords == 4) {
      const uint4 all = __ldg(reinterpret_cast<const uint4*>(from));
      words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
    } else {
      words[0] = __ldg(reinterpret_cast<const uint32_t*>(from));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int32_t count = min(valid - 4 * i, 4);
#pragma unroll 1
    for (int32_t j = 0; j < count; ++j) {
      const auto byte = static_cast<uint8_t>(__ldg(from + 4 * i + j));
      words[i] |= static_cast<uint32_t>(byte) << (8 * j);
    }
  }
}

// The low four bits of each byte as int8: 0..15 becomes 0..7, -8..-1.
__device__ __forceinline__ uint32_t low_int4(uint32_t packed) {
  const uint32_t flipped = (packed & 0x0f0f0f0fu) ^ 0x08080808u;
  return ((flipped | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
}
__device__ __forceinline__ uint32_t high_int4(uint32_t packed) { return low_int4(packed >> 4); }

}  // namespace int8_ops::cuda::attention
