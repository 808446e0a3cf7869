// One plain struct an operation: what a kernel needs to know, with no torch type in it.
// Pointers are raw and contiguous (row-major) unless a stride stands beside them.
#pragma once

#include <cstdint>

#include "numerics.h"

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

// One slice of a latent: the cached integers of all tokens, and what rebuilds keys or values.
struct LatentSlice {
  const int8_t* q = nullptr;   // [batch, groups, tokens, rank], or rank / 2 bytes where packed
  int64_t q_batch_stride = 0;  // bytes
  int64_t q_group_stride = 0;
  int64_t q_token_stride = 0;
  const float* scale = nullptr;    // [batch, groups, tokens], a token's next to the last one's
  int64_t scale_batch_stride = 0;  // elements
  int64_t scale_group_stride = 0;
  const int8_t* a = nullptr;       // [groups, kv_heads / groups * head_dim, rank]
  const float* a_scale = nullptr;  // a float a row of a; of keys the same for a RoPE pair of rows
  int64_t rank = 0;
  bool packed = false;  // int4: byte j holds value j (low half) and j + rank / 2 (high half)
};

// The keys' or the values' latents.
struct LatentStream {
  LatentSlice slices[kMaxSlices];
  int64_t count = 0;
  const void* bias = nullptr;  // [kv_heads, head_dim] or absent
  DType bias_dtype = DType::kFloat32;
};

// Where one slice of new tokens' latents goes: a cache's buffers.
struct LatentSlots {
  int8_t* q = nullptr;         // [batch, groups, capacity, rank], or rank / 2 bytes where packed
  int64_t q_batch_stride = 0;  // bytes
  int64_t q_group_stride = 0;
  int64_t q_token_stride = 0;
  float* scale = nullptr;          // [batch, groups, capacity], neighbours in the last
  int64_t scale_batch_stride = 0;  // elements
  int64_t scale_group_stride = 0;
  int64_t rank = 0;
  bool packed = false;  // int4, as in LatentSlice
};

// New latents [batch, groups, tokens, sum of the slices' ranks], a row's elements neighbours.
struct NewLatents {
  const void* x = nullptr;
  DType dtype = DType::kFloat32;
  int64_t batch_stride = 0;  // elements
  int64_t group_stride = 0;
  int64_t token_stride = 0;
  LatentSlots slices[kMaxSlices];
  int64_t count = 0;
};

// Quantizes new latents of both streams, a slice of a token with a scale of its own, into slots of
// a cache.
struct LatentAppendParams {
  NewLatents k;
  NewLatents v;
  const int64_t* slots = nullptr;  // [tokens]
  int64_t batch = 0;
  int64_t groups = 0;
  int64_t tokens = 0;
  int64_t capacity = 0;
  ExecContext ctx;
};

// Attention of q_len new tokens a row over cached latents; int8_ops/ops.py has the semantics.
struct LatentAttentionParams {
  const void* q = nullptr;  // [batch, heads, q_len, head_dim], rotated; a head's elements in a row
  DType q_dtype = DType::kFloat32;
  int64_t q_batch_stride = 0;  // elements
  int64_t q_head_stride = 0;
  int64_t q_token_stride = 0;
  void* out = nullptr;  // [batch, q_len, heads, head_dim] in q_dtype, contiguous
  LatentStream k;
  LatentStream v;
  const float* inv_freq = nullptr;  // [head_dim / 2]
  const int32_t* start = nullptr;   // [batch]: the first token that is not padding
  const int32_t* length =
      nullptr;  // [batch]: valid tokens; the last q_len of them are the new ones
  const int32_t* origin = nullptr;  // [batch]: RoPE position of token 0; absent: -start
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t groups = 0;
  int64_t q_len = 0;
  int64_t head_dim = 0;
  int64_t capacity = 0;  // tokens that the latents' tensors hold
  int64_t window = 0;    // tokens a query sees, its own included; 0: all
  float scaling = 1.0F;  // of the scores, RoPE's own factor included
  void* workspace = nullptr;
  ExecContext ctx;
};

}  // namespace int8_ops
