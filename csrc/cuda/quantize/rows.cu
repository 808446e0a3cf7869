// Quantization with a scale a row (per token; per channel of a weight).
//
// A row is shared by kThreadsPerRow threads that keep it in registers: load, amax by shuffles (and
// shared memory beyond a warp), quantize, store. Longer rows, and rows that do not start 16-byte
// aligned, take a kernel that reads the row twice; the second read comes from cache.
#include <algorithm>
#include <type_traits>

#include "../launch.cuh"
#include "../ptx/grid_dependency.cuh"
#include "quantize.h"
#include "row_math.cuh"

namespace int8_ops::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// amax over the kThreadsPerRow neighbouring threads of this one; every one of them gets it.
template <int kThreadsPerRow>
__device__ __forceinline__ float row_amax(float amax) {
  constexpr int kLanes = kThreadsPerRow < 32 ? kThreadsPerRow : 32;
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    amax = ptx::max_nan_f32(amax, __shfl_xor_sync(0xffffffffu, amax, offset));
  }
  if constexpr (kThreadsPerRow > 32) {
    constexpr int kWarpsPerRow = kThreadsPerRow / 32;
    __shared__ float warp_amax[kWarps];
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) warp_amax[warp] = amax;
    __syncthreads();
    const int first = warp / kWarpsPerRow * kWarpsPerRow;
#pragma unroll
    for (int i = 0; i < kWarpsPerRow; ++i) {
      amax = ptx::max_nan_f32(amax, warp_amax[first + i]);
    }
  }
  return amax;
}

template <typename T, int kThreadsPerRow, int kChunksPerThread>
__global__ void __launch_bounds__(kThreads)
    quantize_rows_kernel(const T* x, int8_t* q, float* scale, int64_t rows, int32_t cols) {
  ptx::grid_dependency_wait();
  constexpr int kRowsPerBlock = kThreads / kThreadsPerRow;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kThreadsPerRow;
  const int lane = threadIdx.x % kThreadsPerRow;
  const bool in_range = row < rows;
  x += (in_range ? row : 0) * cols;

  Chunk<T> chunks[kChunksPerThread];
#pragma unroll
  for (int i = 0; i < kChunksPerThread; ++i) {
    const int col = (i * kThreadsPerRow + lane) * kChunk;
    if (in_range && col < cols) {
      chunks[i].load(x + col);
    } else {
      chunks[i].clear();
    }
  }
  float amax = 0.0F;
#pragma unroll
  for (int i = 0; i < kChunksPerThread; ++i) amax = ptx::max_nan_f32(amax, chunks[i].amax());
  const RowScale s = RowScale::from_amax(row_amax<kThreadsPerRow>(amax));
  if (!in_range) return;

  q += row * cols;
#pragma unroll
  for (int i = 0; i < kChunksPerThread; ++i) {
    const int col = (i * kThreadsPerRow + lane) * kChunk;
    if (col >= cols) continue;
    float values[kChunk];
    chunks[i].to_float(values);
    *reinterpret_cast<uint2*>(q + col) = quantize_chunk(values, s);
  }
  if (lane == 0) scale[row] = s.stored;
}

// One block a row, value by value: any length, any alignment.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_rows_looped_kernel(const T* x, int8_t* q, float* scale, int32_t cols) {
  ptx::grid_dependency_wait();
  const int64_t row = blockIdx.x;
  x += row * cols;
  q += row * cols;
  float amax = 0.0F;
  for (int col = threadIdx.x; col < cols; col += kThreads) {
    amax = ptx::max_nan_f32(amax, fabsf(as_float(x[col])));
  }
  const RowScale s = RowScale::from_amax(row_amax<kThreads>(amax));
  for (int col = threadIdx.x; col < cols; col += kThreads) {
    q[col] = quantize_one(as_float(x[col]), s);
  }
  if (threadIdx.x == 0) scale[row] = s.stored;
}

template <typename T, int kThreadsPerRow, int kChunksPerThread>
void launch_held(const QuantizeParams& p) {
  constexpr int64_t kRowsPerBlock = kThreads / kThreadsPerRow;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((p.rows + kRowsPerBlock - 1) / kRowsPerBlock));
  shape.block = dim3(kThreads);
  launch<quantize_rows_kernel<T, kThreadsPerRow, kChunksPerThread>>(
      "quantize_rows", shape, p.ctx, static_cast<const T*>(p.x), p.q, p.scale, p.rows,
      static_cast<int32_t>(p.cols));
}

template <typename T>
void launch_for_dtype(const QuantizeParams& p) {
  const bool aligned = p.cols % kChunk == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(p.q) % 8 == 0;
  if (!aligned || p.cols > kThreads * 8 * kChunk) {
    LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>(p.rows));
    shape.block = dim3(kThreads);
    launch<quantize_rows_looped_kernel<T>>("quantize_rows_looped", shape, p.ctx,
                                           static_cast<const T*>(p.x), p.q, p.scale,
                                           static_cast<int32_t>(p.cols));
    return;
  }
  // Few lanes with several chunks each: a warp then has enough loads under way to hide the latency
  // of device memory, which one load a lane does not.
  if (p.cols <= 8 * kChunk) return launch_held<T, 4, 2>(p);
  if (p.cols <= 16 * kChunk) return launch_held<T, 4, 4>(p);
  if (p.cols <= 32 * kChunk) return launch_held<T, 8, 4>(p);
  if (p.cols <= 64 * kChunk) return launch_held<T, 16, 4>(p);
  if (p.cols <= 128 * kChunk) return launch_held<T, 32, 4>(p);
  if (p.cols <= 256 * kChunk) return launch_held<T, 32, 8>(p);
  if (p.cols <= 512 * kChunk) return launch_held<T, 32, 16>(p);
  if (p.cols <= 1024 * kChunk) return launch_held<T, 256, 4>(p);
  return launch_held<T, 256, 8>(p);
}

}  // namespace

void quantize_rows(const QuantizeParams& p) {
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
