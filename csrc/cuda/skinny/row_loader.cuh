// The rows of x that a block multiplies, quantized, in shared memory.
#pragma once

#include <type_traits>

#include "../ptx/cp_async.cuh"
#include "../ptx/max_nan.cuh"
#include "skinny_args.cuh"

namespace int8_ops::cuda::skinny {

// Note [Two passes over x]
// The warps share the rows by units of kUnit values, kBatch units at a time in registers. First
// pass: the amax of every row, met in shared memory. Second pass: quantize. It takes the batches in
// reverse, so that the last one is still in registers: most often it is the only one. The others
// are read again, from L1 or L2.
//
// A float amax is compared by its bits. They order like the values as long as none is negative, and
// a NaN, with its sign off, lies above infinity: it wins, as it must.
template <SkinnyTile kTile, typename T>
class RowLoader {
 public:
  // Starts the loads of the first batch.
  __device__ __forceinline__ RowLoader(const SkinnyArgs& args, SharedStorage<kTile>& shared,
                                       uint8_t* q, int32_t m_first, int32_t rows)
      : args_(args),
        shared_(shared),
        q_(q),
        x_(static_cast<const T*>(args.x) + static_cast<int64_t>(m_first) * args.k),
        rows_(rows),
        units_(rows * args.units) {
    load(0);
    if (threadIdx.x < kTile.rows) shared_.amax[threadIdx.x] = 0;
  }

  // All threads of the block. The rows and their scales are there when this returns.
  template <int /*kLater*/>
  __device__ __forceinline__ void finish(const float* /*a_scale*/) {
    __syncthreads();  // amax is set
    int32_t batch = 0;
    while (true) {
      reduce(batch);
      if ((batch + 1) * kBatchUnits >= units_) break;
      load(++batch);
    }
    __syncthreads();
    if (threadIdx.x < rows_) {
      const auto f = RowFactor::from_amax<T>(__uint_as_float(shared_.amax[threadIdx.x]));
      shared_.row_factors[threadIdx.x] = f;
      shared_.factors.a_scale[threadIdx.x] = f.stored;
    }
    __syncthreads();
    while (true) {
      store(batch);
      if (batch == 0) break;
      load(--batch);
    }
    __syncthreads();
  }

 private:
  static constexpr int kBatch = sizeof(T) == 4 ? 4 : 8;  // 64 registers
  static constexpr int kBatchUnits = kBatch * kTile.warps();
  static constexpr int kChunks = kUnit / (32 * kChunk);  // a lane and unit

  struct Place {
    int32_t row;
    int32_t col;  // of the lane's first chunk; the next are 32 kChunk further
    bool in_range;
  };
  __device__ __forceinline__ Place place(int32_t batch, int i) const {
    const int32_t unit =
        batch * kBatchUnits + i * kTile.warps() + static_cast<int32_t>(threadIdx.x / 32);
    Place at;
    at.row = static_cast<int32_t>(__umulhi(2U * static_cast<uint32_t>(unit), args_.units_inverse));
    at.col =
        (unit - at.row * args_.units) * kUnit + static_cast<int32_t>(threadIdx.x % 32) * kChunk;
    at.in_range = unit < units_;
    return at;
  }

  __device__ __forceinline__ void load(int32_t batch) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const Place at = place(batch, i);
      if (!at.in_range) return;  // the same for the whole warp, and for the units after it
      const T* const from = x_ + at.row * args_.k + at.col;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (at.col + c * 32 * kChunk < args_.k) {
          chunks_[i][c].load_cached(from + c * 32 * kChunk);
        } else {
          chunks_[i][c].clear();
        }
      }
    }
  }

  __device__ __forceinline__ void reduce(int32_t batch) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const Place at = place(batch, i);
      if (!at.in_range) return;
      float amax = chunks_[i][0].amax();
#pragma unroll
      for (int c = 1; c < kChunks; ++c) amax = ptx::max_nan_f32(amax, chunks_[i][c].amax());
      const uint32_t bits = __reduce_max_sync(0xffffffffu, __float_as_uint(amax));
      if (threadIdx.x % 32 == 0) atomicMax(&shared_.amax[at.row], bits);
    }
  }

  __device__ __forceinline__ void store(int32_t batch) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const Place at = place(batch, i);
      if (!at.in_range) return;
      const RowFactor f = shared_.row_factors[at.row];
      uint8_t* const to = q_ + at.row * args_.row_stride + at.col;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (at.col + c * 32 * kChunk >= args_.k) continue;
        uint2 q;
        if constexpr (kOneProduct<T>) {
          q = quantize_chunk(chunks_[i][c], f);
        } else {
          // Twice the work on the FMA units, but a fifth of the code.
          q = quantize_chunk_by_division(chunks_[i][c], f);
        }
        *reinterpret_cast<uint2*>(to + c * 32 * kChunk) = q;
      }
    }
  }

  const SkinnyArgs& args_;
  SharedStorage<kTile>& shared_;
  uint8_t* const q_;
  const T* const x_;
  const int32_t rows_;
  const int32_t units_;
  Chunk<T> chunks_[kBatch][kChunks];
};

// Rows that are quantized already are copied.
template <SkinnyTile kTile>
class RowLoader<kTile, int8_t> {
 public:
  __device__ __forceinline__ RowLoader(const SkinnyArgs& args, SharedStorage<kTile>& shared,
                                       uint8_t* q, int32_t m_first, int32_t rows)
      : shared_(shared), m_first_(m_first), rows_(rows) {
    const auto* const x =
        static_cast<const int8_t*>(args.x) + static_cast<int64_t>(m_first) * args.k;
    const int32_t lane_col = static_cast<int32_t>(threadIdx.x % 32) * 16;
#pragma unroll 1
    for (int32_t unit = static_cast<int32_t>(threadIdx.x / 32); unit < rows * args.units;
         unit += kTile.warps()) {
      const auto row =
          static_cast<int32_t>(__umulhi(2U * static_cast<uint32_t>(unit), args.units_inverse));
      const int32_t col = (unit - row * args.units) * kUnit + lane_col;
      if (col >= args.k) continue;
      ptx::cp_async_16(ptx::shared_address(q + row * args.row_stride + col), x + row * args.k + col,
                       16);
    }
    ptx::cp_async_commit_group();
  }

  // kLater: groups of copies that the thread committed since.
  template <int kLater>
  __device__ __forceinline__ void finish(const float* a_scale) {
    if (a_scale != nullptr && threadIdx.x < rows_) {
      shared_.factors.a_scale[threadIdx.x] = __ldg(a_scale + m_first_ + threadIdx.x);
    }
    ptx::cp_async_wait_group<kLater>();
    __syncthreads();
  }

 private:
  SharedStorage<kTile>& shared_;
  const int32_t m_first_;
  const int32_t rows_;
};

}  // namespace int8_ops::cuda::skinny
