// The scale epilogue, shared by every architecture's GEMM:
//
//   y[i, j] = round((float(acc[i, j]) * a_scale[i]) * w_scale[j] + bias[j])
//
// float(acc) rounds to nearest even; each * and + rounds once in float32 (__fmul_rn and __fadd_rn
// are never contracted to an FMA); the last rounding is to the output dtype. With out_dtype kInt32
// the sums are stored as they are.
#pragma once

#include "convert.cuh"

namespace int8_ops::cuda {

struct ScaleEpilogue {
  const float* a_scale;  // [m]
  const float* w_scale;  // [n]
  const void* bias;      // [n] or absent
  DType bias_dtype;
  void* out;  // [m, n]
  DType out_dtype;
  int32_t m;
  int32_t n;
  // Rows of out start 16-byte aligned, so that eight columns can be stored at once.
  bool vector_stores;

  __device__ __forceinline__ bool is_raw() const { return out_dtype == DType::kInt32; }

  // What eight neighbouring columns need, loaded once for all the rows a thread holds.
  struct Columns {
    float w_scale[8];
    float bias[8];
  };

  __device__ __forceinline__ Columns load_columns(int32_t col) const {
    Columns c = {};
    if (is_raw()) return c;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (col + e >= n) continue;
      c.w_scale[e] = __ldg(w_scale + col + e);
      if (bias != nullptr) c.bias[e] = load_float(bias, bias_dtype, col + e);
    }
    return c;
  }

  __device__ __forceinline__ float scaled(int32_t acc, float row_scale, const Columns& c,
                                          int e) const {
    const float y = __fmul_rn(__fmul_rn(__int2float_rn(acc), row_scale), c.w_scale[e]);
    // Not y + 0: that would turn a -0 into a +0.
    return bias != nullptr ? __fadd_rn(y, c.bias[e]) : y;
  }

  // Eight consecutive columns of one row, starting at a multiple of eight.
  __device__ __forceinline__ void store_x8(int32_t row, int32_t col, const int32_t (&acc)[8],
                                           const Columns& columns) const {
    if (row >= m || col >= n) return;
    const int64_t at = static_cast<int64_t>(row) * n + col;
    const bool vector = vector_stores && col + 8 <= n;
    if (is_raw()) {
      auto* raw = static_cast<int32_t*>(out) + at;
      if (vector) {
        reinterpret_cast<int4*>(raw)[0] = make_int4(acc[0], acc[1], acc[2], acc[3]);
        reinterpret_cast<int4*>(raw)[1] = make_int4(acc[4], acc[5], acc[6], acc[7]);
        return;
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (col + e < n) raw[e] = acc[e];
      }
      return;
    }
    const float row_scale = __ldg(a_scale + row);
    if (vector) {
      float y[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) y[e] = scaled(acc[e], row_scale, columns, e);
      store_float_x8(out, out_dtype, at, y);
      return;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (col + e < n) store_float(out, out_dtype, at + e, scaled(acc[e], row_scale, columns, e));
    }
  }
};

}  // namespace int8_ops::cuda
