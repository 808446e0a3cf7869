// One plain struct an operation: what a kernel needs to know, with no torch type in it.
// Pointers are raw and contiguous (row-major) unless a stride stands beside them.
#pragma once

#include <cstdint>

namespace int8_ops {

// Element types that cross the door between torch and the kernels.
enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kInt32 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kInt32 ? 4 : 2;
}

inline bool is_aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Where a kernel runs. On the CPU both fields are unused.
struct ExecContext {
  int32_t device_index = 0;
  void* stream = nullptr;  // cudaStream_t
};

// x [rows, cols] -> q int8 [rows, cols] and one float32 scale a row, or a column.
struct QuantizeParams {
  const void* x = nullptr;
  DType x_dtype = DType::kFloat32;
  int8_t* q = nullptr;
  float* scale = nullptr;  // [rows], or [cols] when scale_per_col
  int64_t rows = 0;
  int64_t cols = 0;
  bool scale_per_col = false;
  ExecContext ctx;
};

// q int8 [rows, cols] * scale -> out [rows, cols], rounded once.
struct DequantizeParams {
  const int8_t* q = nullptr;
  const float* scale = nullptr;  // [rows], or [cols] when scale_per_col
  void* out = nullptr;
  DType out_dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t cols = 0;
  bool scale_per_col = false;
  ExecContext ctx;
};

// a int8 [m, k] times w int8 [n, k] transposed -> out [m, n].
// out_dtype kInt32: the exact sums, scales and bias absent. Otherwise the scale epilogue:
// out = round((float(acc) * a_scale[i]) * w_scale[j] + bias[j]).
// Or with x in place of a and a_scale: a row of x is quantized to a row of a and its scale on the
// way, in a pass before (common/quantized_rows.h) or inside the kernel.
struct MatmulParams {
  const int8_t* a = nullptr;
  const void* x = nullptr;  // [m, k], or absent
  DType x_dtype = DType::kFloat32;
  const int8_t* w = nullptr;
  const float* a_scale = nullptr;  // [m]
  const float* w_scale = nullptr;  // [n]
  const void* bias = nullptr;      // [n] or absent
  DType bias_dtype = DType::kFloat32;
  void* out = nullptr;
  DType out_dtype = DType::kInt32;
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  void* workspace = nullptr;  // as many bytes as matmul_workspace_bytes() asked for
  // A device's own choice for the problem, made by matmul_workspace_bytes() and kept for matmul().
  int32_t plan_path = -1;
  int32_t plan_tile = -1;
  int32_t plan_splits = 0;
  bool plan_pass = false;
  ExecContext ctx;
};

}  // namespace int8_ops
