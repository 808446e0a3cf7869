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
    case DType::kFloat16: return __half2float(static_cast<const __half*>(base)[i]);
    case DType::kBFloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(base)[i]);
    default: return static_cast<const float*>(base)[i];
  }
}

__device__ __forceinline__ void store_float(void* base, DType dtype, int64_t i, float y) {
  switch (dtype) {
    case DType::kFloat16: static_cast<__half*>(base)[i] = __float2half_rn(y); break;
    case DType::kBFloat16: static_cast<__nv_bfloat16*>(base)[i] = __float2bfloat16_rn(y); break;
    default: static_cast<float*>(base)[i] = y;
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
