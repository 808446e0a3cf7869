// What the epilogue needs of one column, for kernels in which a thread keeps to its columns.
#pragma once

#include "../ptx/load_global.cuh"
#include "scale_epilogue.cuh"

namespace int8_ops::cuda {

// w_scale and bias of a thread's column, asked for early, looked at late.
class ColumnFactors {
 public:
  __device__ __forceinline__ void load(const ScaleEpilogue& e, uint32_t col) {
    w_scale_ = bias_ = 0;
    if (col >= static_cast<uint32_t>(e.n) || e.out_dtype == DType::kInt32) return;
    w_scale_ = ptx::ld_global_nc_32(e.w_scale + col);
    if (e.bias == nullptr) return;
    bias_ = e.bias_dtype == DType::kFloat32
                ? ptx::ld_global_nc_32(static_cast<const float*>(e.bias) + col)
                : ptx::ld_global_nc_16(static_cast<const uint16_t*>(e.bias) + col);
  }
  __device__ __forceinline__ float w_scale() const { return __uint_as_float(w_scale_); }
  __device__ __forceinline__ float bias(const ScaleEpilogue& e) const {
    return load_float(&bias_, e.bias_dtype, 0);
  }

 private:
  uint32_t w_scale_;
  uint32_t bias_;  // as it lies in memory
};

}  // namespace int8_ops::cuda
