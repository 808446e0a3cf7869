// The scale epilogue, shared by every architecture's GEMM:
//
//   y[i, j] = round((float(acc[i, j]) * a_scale[i]) * w_scale[j] + bias[j])
//
// float(acc) rounds to nearest even; each * and + rounds once in float32 (__fmul_rn and __fadd_rn
// are never contracted to an FMA); the last rounding is to the output dtype. With out_dtype kInt32
// the sums are stored as they are.
#pragma once

#include "../ptx/cp_async.cuh"
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
  // Eight columns at once: n is a multiple of eight, every pointer is 16-byte aligned.
  bool vector;

  // The algebra, but for the bias.
  static __device__ __forceinline__ float scaled(int32_t acc, float row_scale, float w_scale) {
    return __fmul_rn(__fmul_rn(__int2float_rn(acc), row_scale), w_scale);
  }

  // What eight neighbouring columns need.
  struct Columns {
    float w_scale[8];
    float bias[8];
  };

  // From global memory.
  template <bool kVector>
  __device__ __forceinline__ Columns load_columns(int32_t col) const {
    Columns c = {};
    if constexpr (kVector) {
      load_float_x8(w_scale, DType::kFloat32, col, c.w_scale);
      if (bias != nullptr) load_float_x8(bias, bias_dtype, col, c.bias);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (col + e >= n) continue;
        c.w_scale[e] = __ldg(w_scale + col + e);
        if (bias != nullptr) c.bias[e] = load_float(bias, bias_dtype, col + e);
      }
    }
    return c;
  }

  // Eight consecutive columns of one row, starting at a multiple of eight.
  // kOut is out_dtype, known while compiling: with_out_dtype() below.
  template <DType kOut, bool kVector>
  __device__ __forceinline__ void store_x8(int32_t row, int32_t col, const int32_t (&acc)[8],
                                           float row_scale, const Columns& columns) const {
    if (row >= m || col >= n) return;
    const int64_t at = static_cast<int64_t>(row) * n + col;
    if constexpr (kOut == DType::kInt32) {
      auto* raw = static_cast<int32_t*>(out) + at;
      if constexpr (kVector) {
        reinterpret_cast<int4*>(raw)[0] = make_int4(acc[0], acc[1], acc[2], acc[3]);
        reinterpret_cast<int4*>(raw)[1] = make_int4(acc[4], acc[5], acc[6], acc[7]);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (col + e < n) raw[e] = acc[e];
        }
      }
    } else {
      float y[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        y[e] = scaled(acc[e], row_scale, columns.w_scale[e]);
      }
      // A branch and not y + 0: that would turn a -0 into a +0.
      if (bias != nullptr) {
#pragma unroll
        for (int e = 0; e < 8; ++e) y[e] = __fadd_rn(y[e], columns.bias[e]);
      }
      if constexpr (kVector) {
        store_float_x8(out, kOut, at, y);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (col + e < n) store_float(out, kOut, at + e, y[e]);
        }
      }
    }
  }

  // Calls visit.template operator()<out dtype, vector>(): the choice is made once a thread.
  template <typename Visitor>
  __device__ __forceinline__ void with_out_dtype(Visitor&& visit) const {
    switch (out_dtype) {
      case DType::kInt32:
        return with_vector<DType::kInt32>(visit);
      case DType::kFloat32:
        return with_vector<DType::kFloat32>(visit);
      case DType::kFloat16:
        return with_vector<DType::kFloat16>(visit);
      case DType::kBFloat16:
        return with_vector<DType::kBFloat16>(visit);
    }
  }

 private:
  template <DType kOut, typename Visitor>
  __device__ __forceinline__ void with_vector(Visitor&& visit) const {
    if (vector) {
      visit.template operator()<kOut, true>();
    } else {
      visit.template operator()<kOut, false>();
    }
  }
};

// The scales and the bias of one block's tile, in shared memory: fetched while the products run, so
// that the epilogue does not wait for global memory row by row.
template <int kRows, int kCols>
struct alignas(128) EpilogueFactors {
  float a_scale[kRows];
  alignas(16) float w_scale[kCols];
  alignas(16) float bias[kCols];

  // All `threads` of the block call this. The values are there after the caller's next committed
  // group of asynchronous copies was waited for, and a barrier.
  __device__ __forceinline__ void fetch(const ScaleEpilogue& e, int32_t m_first, int32_t n_first,
                                        int threads) {
    if (e.out_dtype == DType::kInt32) return;
    for (int i = threadIdx.x; i < kRows; i += threads) {
      if (m_first + i < e.m) ptx::cp_async_4(&a_scale[i], e.a_scale + m_first + i);
    }
    for (int i = threadIdx.x; i < kCols; i += threads) {
      if (n_first + i >= e.n) continue;
      ptx::cp_async_4(&w_scale[i], e.w_scale + n_first + i);
      if (e.bias != nullptr) bias[i] = load_float(e.bias, e.bias_dtype, n_first + i);
    }
  }

  // Of columns [col, col + 8) of the tile, col a multiple of eight.
  __device__ __forceinline__ ScaleEpilogue::Columns columns(int col) const {
    ScaleEpilogue::Columns c;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      c.w_scale[e] = w_scale[col + e];
      c.bias[e] = bias[col + e];
    }
    return c;
  }
};

}  // namespace int8_ops::cuda
