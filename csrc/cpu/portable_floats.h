// 16-bit floats and int8 sums in plain C++, for the portable kernels.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/params.h"

namespace int8_ops::cpu {
namespace {

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// In integers and float32, because not every compiler that can build this has a 16-bit float type.
inline float half_bits_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude < 0x0400) {  // zero and subnormals: integer multiples of 2^-24
    const float x = static_cast<float>(magnitude) * 0x1p-24F;
    return sign != 0 ? -x : x;
  }
  return bits_to_float(sign | ((magnitude << 13) + ((127U - 15U) << 23)));
}

inline uint16_t float_to_half_bits(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  // From 65520 on, halfway between the largest half and 2^16, all rounds to infinity.
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) {
    // Below 2^-14 a half has steps of 2^-24, which are float32's own steps in [0.5, 1): the
    // addition rounds to them, and the step count is left in the low bits.
    return static_cast<uint16_t>(
        sign | (float_to_bits(bits_to_float(magnitude) + 0.5F) - float_to_bits(0.5F)));
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return static_cast<uint16_t>(sign | ((magnitude - ((127U - 15U) << 23) + 0xfff + odd) >> 13));
}

inline float load_as_float(const void* base, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(base)[i];
  const uint16_t bits = static_cast<const uint16_t*>(base)[i];
  if (dtype == DType::kFloat16) return half_bits_to_float(bits);
  return bits_to_float(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t float_to_bfloat16_bits(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return 0x7fc0;  // torch's quiet NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store_from_float(void* base, DType dtype, int64_t i, float x) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(base)[i] = x;
  } else if (dtype == DType::kFloat16) {
    static_cast<uint16_t*>(base)[i] = float_to_half_bits(x);
  } else {
    static_cast<uint16_t*>(base)[i] = float_to_bfloat16_bits(x);
  }
}

inline int32_t dot(const int8_t* a, const int8_t* w, int64_t k) {
  int32_t acc = 0;
  for (int64_t i = 0; i < k; ++i) acc += static_cast<int32_t>(a[i]) * static_cast<int32_t>(w[i]);
  return acc;
}

}  // namespace
}  // namespace int8_ops::cpu
