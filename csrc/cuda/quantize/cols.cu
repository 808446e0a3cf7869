// Quantization with a scale a column (per channel of a weight along axis 1).
//
// A block owns kColsPerBlock columns and all their rows. Its threads form kRowLanes rows of
// kChunkLanes; each runs down its columns twice, for the amax and for the values, and the lanes of
// a column meet in shared memory in between. Weights are quantized once, so the second read is
// fine.
#include "../launch.cuh"
#include "../ptx/grid_dependency.cuh"
#include "quantize.h"
#include "row_math.cuh"

namespace int8_ops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kChunkLanes = 4;
constexpr int kRowLanes = kThreads / kChunkLanes;
constexpr int kColsPerBlock = kChunkLanes * kChunk;

template <typename T>
__device__ __forceinline__ void load_chunk(const T* row, int32_t col, int32_t cols, bool aligned,
                                           float (&x)[kChunk]) {
  if (aligned) {
    Chunk<T> chunk;
    chunk.load(row + col);
    float half[4];
    chunk.template to_float<0>(half);
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = half[e];
    chunk.template to_float<1>(half);
#pragma unroll
    for (int e = 0; e < 4; ++e) x[4 + e] = half[e];
    return;
  }
#pragma unroll
  for (int e = 0; e < kChunk; ++e) x[e] = col + e < cols ? as_float(row[col + e]) : 0.0F;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_cols_kernel(const T* x, int8_t* q, float* scale, int64_t rows, int32_t cols,
                         bool aligned) {
  ptx::grid_dependency_wait();
  __shared__ float partial[kRowLanes][kColsPerBlock];
  __shared__ float col_amax[kColsPerBlock];
  const int chunk_lane = threadIdx.x % kChunkLanes;
  const int row_lane = threadIdx.x / kChunkLanes;
  const int32_t col = static_cast<int32_t>(blockIdx.x) * kColsPerBlock + chunk_lane * kChunk;

  float amax[kChunk] = {};
  if (col < cols) {
    for (int64_t row = row_lane; row < rows; row += kRowLanes) {
      float values[kChunk];
      load_chunk(x + row * cols, col, cols, aligned, values);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) amax[e] = ptx::max_nan_f32(amax[e], fabsf(values[e]));
    }
  }
#pragma unroll
  for (int e = 0; e < kChunk; ++e) partial[row_lane][chunk_lane * kChunk + e] = amax[e];
  __syncthreads();
  if (threadIdx.x < kColsPerBlock) {
    float m = 0.0F;
    for (int lane = 0; lane < kRowLanes; ++lane) {
      m = ptx::max_nan_f32(m, partial[lane][threadIdx.x]);
    }
    col_amax[threadIdx.x] = m;
    const int32_t own = static_cast<int32_t>(blockIdx.x) * kColsPerBlock + threadIdx.x;
    if (own < cols) scale[own] = RowScale::from_amax(m).stored;
  }
  __syncthreads();
  if (col >= cols) return;

  RowScale scales[kChunk];
#pragma unroll
  for (int e = 0; e < kChunk; ++e) {
    scales[e] = RowScale::from_amax(col_amax[chunk_lane * kChunk + e]);
  }
  for (int64_t row = row_lane; row < rows; row += kRowLanes) {
    float values[kChunk];
    load_chunk(x + row * cols, col, cols, aligned, values);
    int8_t* to = q + row * cols + col;
    if (aligned) {
      union {
        int8_t bytes[kChunk];
        uint2 packed;
      } out;
#pragma unroll
      for (int e = 0; e < kChunk; ++e) out.bytes[e] = quantize_one(values[e], scales[e]);
      *reinterpret_cast<uint2*>(to) = out.packed;
      continue;
    }
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      if (col + e < cols) to[e] = quantize_one(values[e], scales[e]);
    }
  }
}

template <typename T>
void launch_for_dtype(const QuantizeParams& p) {
  const bool aligned = p.cols % kChunk == 0 && is_aligned(p.x, 16) && is_aligned(p.q, 8);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((p.cols + kColsPerBlock - 1) / kColsPerBlock));
  shape.block = dim3(kThreads);
  launch<quantize_cols_kernel<T>>("quantize_cols", shape, p.ctx, static_cast<const T*>(p.x), p.q,
                                  p.scale, p.rows, checked_int32(p.cols, "columns"), aligned);
}

}  // namespace

void quantize_cols(const QuantizeParams& p) {
  switch (p.x_dtype) {
    case DType::kFloat16:
      return launch_for_dtype<__half>(p);
    case DType::kBFloat16:
      return launch_for_dtype<__nv_bfloat16>(p);
    default:
      return launch_for_dtype<float>(p);
  }
}

}  // namespace int8_ops::cuda
