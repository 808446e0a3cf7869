// Loads and stores of the float dtypes that cross the API, chosen at run time: the branch is the
// same for a whole grid, and one kernel then serves every dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../../common/params.h"

namespace int8_ops::cuda {

__device__ __forceinline__ float load_float(const void* base, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(base)[i]);
    case DType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(base)[i]);
    default:
      return static_cast<const float*>(base)[i];
  }
}

__device__ __forceinline__ void store_float(void* base, DType dtype, int64_t i, float y) {
  switch (dtype) {
    case DType::kFloat16:
      static_cast<__half*>(base)[i] = __float2half_rn(y);
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(base)[i] = __float2bfloat16_rn(y);
      break;
    default:
      static_cast<float*>(base)[i] = y;
  }
}

// Eight consecutive values with 16-byte loads; `base + i` is 16-byte aligned.
__device__ __forceinline__ void load_float_x8(const void* base, DType dtype, int64_t i,
                                              float (&y)[8]) {
  if (dtype == DType::kFloat32) {
    const auto* from = reinterpret_cast<const float4*>(static_cast<const float*>(base) + i);
    const float4 lo = __ldg(from);
    const float4 hi = __ldg(from + 1);
    y[0] = lo.x, y[1] = lo.y, y[2] = lo.z, y[3] = lo.w;
    y[4] = hi.x, y[5] = hi.y, y[6] = hi.z, y[7] = hi.w;
    return;
  }
  const uint4 raw = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(base) + i));
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    if (dtype == DType::kFloat16) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[p]));
      y[2 * p] = pair.x, y[2 * p + 1] = pair.y;
    } else {
      y[2 * p] = __uint_as_float(words[p] << 16);
      y[2 * p + 1] = __uint_as_float(words[p] & 0xffff0000u);
    }
  }
}

// Two floats to two 16-bit values, rounded to nearest even.
__device__ __forceinline__ uint32_t pack_16bit(DType dtype, float lo, float hi) {
  if (dtype == DType::kFloat16) {
    const __half2 h = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&h);
  }
  const __nv_bfloat162 b = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&b);
}

// Eight consecutive values with 16-byte stores; `base + i` is 16-byte aligned.
__device__ __forceinline__ void store_float_x8(void* base, DType dtype, int64_t i,
                                               const float (&y)[8]) {
  if (dtype == DType::kFloat32) {
    auto* out = reinterpret_cast<float4*>(static_cast<float*>(base) + i);
    out[0] = make_float4(y[0], y[1], y[2], y[3]);
    out[1] = make_float4(y[4], y[5], y[6], y[7]);
    return;
  }
  uint4 packed;
  packed.x = pack_16bit(dtype, y[0], y[1]);
  packed.y = pack_16bit(dtype, y[2], y[3]);
  packed.z = pack_16bit(dtype, y[4], y[5]);
  packed.w = pack_16bit(dtype, y[6], y[7]);
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(base) + i) = packed;
}

}  // namespace int8_ops::cuda
