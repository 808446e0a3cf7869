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

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Resident blocks a multiprocessor: as many as leave room for two rows' chunks in registers.
template <typename T>
constexpr int blocks_per_sm(int chunks_per_thread) {
  const int size = chunks_per_thread * static_cast<int>(sizeof(T));
  return size <= 8 ? 4 : size <= 16 ? 2 : 1;
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

// Blocks stay and take rows in turn. A thread's chunks of its next row are loaded before its
// present row is quantized, so that device memory always has something to do.
template <typename T, int kThreadsPerRow, int kChunksPerThread>
__global__ void __launch_bounds__(kThreads, blocks_per_sm<T>(kChunksPerThread))
    quantize_rows_kernel(const T* x, int8_t* q, float* scale, int64_t rows, int32_t cols) {
  constexpr int kRowsPerBlock = kThreads / kThreadsPerRow;
  __shared__ float scratch[2][kWarps];
  ptx::grid_dependency_wait();
  const int lane = threadIdx.x % kThreadsPerRow;
  const int row_in_block = threadIdx.x / kThreadsPerRow;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;

  using Chunks = Chunk<T>[kChunksPerThread];
  const auto load_row = [&](Chunks& chunks, int64_t row) {
#pragma unroll
    for (int i = 0; i < kChunksPerThread; ++i) {
      const int col = (i * kThreadsPerRow + lane) * kChunk;
      if (row < rows && col < cols) {
        chunks[i].load(x + row * cols + col);
      } else {
        chunks[i].clear();
      }
    }
  };

  Chunks next;
  int64_t first = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock;  // of the block
  load_row(next, first + row_in_block);
  for (int turn = 0; first < rows; first += stride, turn ^= 1) {
    const int64_t row = first + row_in_block;
    Chunks now;
#pragma unroll
    for (int i = 0; i < kChunksPerThread; ++i) now[i] = next[i];
    load_row(next, row + stride);

    float amax = 0.0F;
#pragma unroll
    for (int i = 0; i < kChunksPerThread; ++i) amax = ptx::max_nan_f32(amax, now[i].amax());
    const RowScale s = RowScale::from_amax(row_amax<kThreadsPerRow>(amax, scratch[turn]));
    if (row >= rows) continue;
#pragma unroll
    for (int i = 0; i < kChunksPerThread; ++i) {
      const int col = (i * kThreadsPerRow + lane) * kChunk;
      if (col >= cols) continue;
      float values[kChunk];
      now[i].to_float(values);
      *reinterpret_cast<uint2*>(q + row * cols + col) = quantize_chunk(values, s);
    }
    if (lane == 0) scale[row] = s.stored;
  }
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
  for (int col = threadIdx.x; col < cols; col += kThreads) {
    amax = ptx::max_nan_f32(amax, fabsf(as_float(x[col])));
  }
  const RowScale s = RowScale::from_amax(row_amax<kThreads>(amax, scratch));
  for (int col = threadIdx.x; col < cols; col += kThreads) {
    q[col] = quantize_one(as_float(x[col]), s);
  }
  if (threadIdx.x == 0) scale[row] = s.stored;
}

template <typename T, int kThreadsPerRow, int kChunksPerThread>
void launch_held(const QuantizeParams& p, int32_t sm_count) {
  constexpr int64_t kRowsPerBlock = kThreads / kThreadsPerRow;
  const int64_t needed = (p.rows + kRowsPerBlock - 1) / kRowsPerBlock;
  const int64_t resident = static_cast<int64_t>(sm_count) * blocks_per_sm<T>(kChunksPerThread);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(std::min(needed, resident)));
  shape.block = dim3(kThreads);
  launch<quantize_rows_kernel<T, kThreadsPerRow, kChunksPerThread>>(
      "quantize_rows", shape, p.ctx, static_cast<const T*>(p.x), p.q, p.scale, p.rows,
      static_cast<int32_t>(p.cols));
}

template <typename T>
void launch_for_dtype(const QuantizeParams& p, int32_t sm_count) {
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
  const auto fits = [&](int64_t chunks) { return p.cols <= chunks * kChunk; };
  if (fits(8)) return launch_held<T, 4, 2>(p, sm_count);
  if (fits(16)) return launch_held<T, 4, 4>(p, sm_count);
  if (fits(32)) return launch_held<T, 8, 4>(p, sm_count);
  if (fits(64)) return launch_held<T, 16, 4>(p, sm_count);
  if (fits(128)) return launch_held<T, 32, 4>(p, sm_count);
  if (fits(256)) return launch_held<T, 64, 4>(p, sm_count);
  if (fits(512)) return launch_held<T, 128, 4>(p, sm_count);
  if (fits(1024)) return launch_held<T, 256, 4>(p, sm_count);
  return launch_held<T, 256, 8>(p, sm_count);
}

}  // namespace

void quantize_rows(const QuantizeParams& p, int32_t sm_count) {
  switch (p.x_dtype) {
    case DType::kFloat16:
      return launch_for_dtype<__half>(p, sm_count);
    case DType::kBFloat16:
      return launch_for_dtype<__nv_bfloat16>(p, sm_count);
    default:
      return launch_for_dtype<float>(p, sm_count);
  }
}

}  // namespace int8_ops::cuda
