// Quantization with a scale a row (per token; per channel of a weight).
//
// A row is shared by kThreadsPerRow threads that hold it in registers: load, amax by shuffles (and
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

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
// So many run at once. In a larger grid the successor's blocks take the place of its last ones:
// [32768, 512] after [32768, 512] then takes 24.1 us instead of 19.6.
constexpr unsigned kFewBlocks = 256;

// Resident blocks a multiprocessor, so that device memory always has loads to serve: as many as
// leave room for a thread's chunks in registers (measured: one step more spills, and costs a
// quarter).
template <typename T>
constexpr int blocks_per_sm(int chunks_per_thread) {
  const int bytes = chunks_per_thread * kChunk * static_cast<int>(sizeof(T));
  return bytes <= 32 ? 16 : bytes <= 64 ? 12 : bytes <= 128 ? 6 : bytes <= 256 ? 3 : 2;
}

// amax over the kThreadsPerRow neighbouring threads of this one; every one of them gets it.
// `scratch` is used beyond a warp, and free for other use two calls later.
template <int kThreadsPerRow>
__device__ __forceinline__ float row_amax(float amax, float (&scratch)[kWarps]) {
  constexpr int kLanes = kThreadsPerRow < 32 ? kThreadsPerRow : 32;
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    amax = ptx::max_nan_f32(amax, __shfl_xor_sync(0xffffffffu, amax, offset));
  }
  if constexpr (kThreadsPerRow > 32) {
    constexpr int kWarpsPerRow = kThreadsPerRow / 32;
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) scratch[warp] = amax;
    __syncthreads();
    const int first = warp / kWarpsPerRow * kWarpsPerRow;
#pragma unroll
    for (int i = 0; i < kWarpsPerRow; ++i) amax = ptx::max_nan_f32(amax, scratch[first + i]);
  }
  return amax;
}

template <typename T, int kThreadsPerRow, int kChunksPerThread>
__global__ void __launch_bounds__(kThreads, blocks_per_sm<T>(kChunksPerThread))
    quantize_rows_kernel(const T* x, int8_t* q, float* scale, int64_t rows, int32_t cols) {
  constexpr int kRowsPerBlock = kThreads / kThreadsPerRow;
  __shared__ float scratch[kWarps];
  ptx::grid_dependency_wait();
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
  // The rows have arrived, and all blocks run: what follows is short.
  if (gridDim.x <= kFewBlocks) ptx::grid_dependency_trigger();
  const RowFactor f = RowFactor::from_amax<T>(row_amax<kThreadsPerRow>(amax, scratch));
  if (!in_range) return;

  q += row * cols;
#pragma unroll
  for (int i = 0; i < kChunksPerThread; ++i) {
    const int col = (i * kThreadsPerRow + lane) * kChunk;
    if (col >= cols) continue;
    *reinterpret_cast<uint2*>(q + col) = quantize_chunk(chunks[i], f);
  }
  if (lane == 0) scale[row] = f.stored;
}

// One block a row, value by value: any length, any alignment.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_rows_looped_kernel(const T* x, int8_t* q, float* scale, int32_t cols) {
  __shared__ float scratch[kWarps];
  ptx::grid_dependency_wait();
  const int64_t row = blockIdx.x;
  x += row * cols;
  q += row * cols;
  float amax = 0.0F;
  for (int64_t col = threadIdx.x; col < cols; col += kThreads) {
    amax = ptx::max_nan_f32(amax, fabsf(as_float(x[col])));
  }
  const RowScale s = RowScale::from_amax(row_amax<kThreads>(amax, scratch));
  for (int64_t col = threadIdx.x; col < cols; col += kThreads) {
    q[col] = quantize_one(as_float(x[col]), s);
  }
  if (threadIdx.x == 0) scale[row] = s.stored;
}

template <typename T, int kThreadsPerRow, int kChunksPerThread>
void launch_held(const QuantizeParams& p) {
  constexpr int64_t kRowsPerBlock = kThreads / kThreadsPerRow;
  LaunchShape shape;
  shape.grid = dim3(checked_int32((p.rows + kRowsPerBlock - 1) / kRowsPerBlock, "blocks of rows"));
  shape.block = dim3(kThreads);
  launch<quantize_rows_kernel<T, kThreadsPerRow, kChunksPerThread>>(
      "quantize_rows", shape, p.ctx, static_cast<const T*>(p.x), p.q, p.scale, p.rows,
      checked_int32(p.cols, "columns"));
}

template <typename T>
void launch_for_dtype(const QuantizeParams& p) {
  const bool aligned = p.cols % kChunk == 0 && is_aligned(p.x, 16) && is_aligned(p.q, 8);
  if (!aligned || p.cols > kThreads * 16 * kChunk) {
    LaunchShape shape;
    shape.grid = dim3(checked_int32(p.rows, "rows"));
    shape.block = dim3(kThreads);
    launch<quantize_rows_looped_kernel<T>>("quantize_rows_looped", shape, p.ctx,
                                           static_cast<const T*>(p.x), p.q, p.scale,
                                           checked_int32(p.cols, "columns"));
    return;
  }
  // Two chunks a lane where a warp's rows are short, four beyond: enough loads under way to hide
  // the latency of device memory, which one load a lane is not.
  const auto fits = [&](int64_t chunks) { return p.cols <= chunks * kChunk; };
  if (fits(8)) return launch_held<T, 4, 2>(p);
  if (fits(16)) return launch_held<T, 8, 2>(p);
  if (fits(32)) return launch_held<T, 16, 2>(p);
  if (fits(64)) return launch_held<T, 32, 2>(p);
  if (fits(128)) return launch_held<T, 32, 4>(p);
  if (fits(256)) return launch_held<T, 64, 4>(p);
  if (fits(512)) return launch_held<T, 128, 4>(p);
  if (fits(1024)) return launch_held<T, 128, 8>(p);
  return launch_held<T, 128, 16>(p);
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
