// Quantization on the way into shared memory: sixteen rows of x a warp, read once from global
// memory, written as int8 where wgmma reads them.
#pragma once

#include <cstdint>

#include "../quantize/row_math.cuh"
#include "warpgroup_tile.cuh"

namespace int8_ops::cuda::sm90 {

// Rows of up to kLanes * kChunks * 8 values; kLanes neighbouring lanes share one. The loop is kept
// short and rolled: straight-line code for sixteen rows is run from cold instruction memory.
template <typename T, int kLanes, int kChunks>
struct RowQuantizer {
  static constexpr int kRows = 16;
  static constexpr int kRowsPerPass = 32 / kLanes;
  // Chunks of a thread that are worked on together, and loaded one and two rounds ahead.
  static constexpr int kPasses = 4 / kChunks;
  static constexpr int kRoundRows = kPasses * kRowsPerPass;
  static constexpr int kRounds = kRows / kRoundRows;
  static_assert(kRows % kRoundRows == 0);

  using Round = Chunk<T>[kPasses][kChunks];

  static __device__ __forceinline__ void load(Round& round, const T* x, int32_t row, int32_t m,
                                              int32_t k, int lane) {
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const int32_t r = row + p * kRowsPerPass;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int32_t col = (i * kLanes + lane) * kChunk;
        if (r < m && col < k) {
          round[p][i].load(x + static_cast<int64_t>(r) * k + col);
        } else {
          round[p][i].clear();
        }
      }
    }
  }

  // `place` is where row 0 of the warp's sixteen begins in its first K-block; K-blocks are
  // block_bytes apart. local_row: of the round's first pass, for this lane.
  static __device__ __forceinline__ void store(const Round& round, uint8_t* place,
                                               int32_t block_bytes, float* scales,
                                               int32_t local_row, int32_t padded_k, int lane) {
    float amax[kPasses];
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      amax[p] = round[p][0].amax();
#pragma unroll
      for (int i = 1; i < kChunks; ++i) amax[p] = ptx::max_nan_f32(amax[p], round[p][i].amax());
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        amax[p] = ptx::max_nan_f32(amax[p], __shfl_xor_sync(0xffffffffu, amax[p], offset));
      }
    }
    // The divisions are long: lane p of a row's lanes does those of pass p, and the others ask it.
    float mine = amax[0];
#pragma unroll
    for (int p = 1; p < kPasses; ++p) mine = lane == p ? amax[p] : mine;
    const RowScale computed = RowScale::from_amax(mine);
    if (lane < kPasses) scales[local_row + lane * kRowsPerPass] = computed.stored;
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      RowScale s;
      s.stored = 0.0F;
      s.divisor = __shfl_sync(0xffffffffu, computed.divisor, p, kLanes);
      s.inverse = __shfl_sync(0xffffffffu, computed.inverse, p, kLanes);
      s.finite = amax[p] <= 3.402823466e38F;
      const int32_t row = local_row + p * kRowsPerPass;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int32_t chunk = i * kLanes + lane;
        if (chunk * kChunk >= padded_k) continue;
        // Sixteen chunks a K-block; two make sixteen bytes, whose place is swizzled.
        const int32_t sixteen = (chunk % 16 / 2) ^ (row % 8);
        *reinterpret_cast<uint2*>(place + chunk / 16 * block_bytes + row * kBlockK + sixteen * 16 +
                                  chunk % 2 * 8) = quantize_chunk(round[p][i], s);
      }
    }
  }

  static __device__ __forceinline__ void copy(Round& to, const Round& from) {
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) to[p][i] = from[p][i];
    }
  }

  // Rows row .. row + 15 of x [m, k]; what lies beyond m or k becomes zeros.
  static __device__ __forceinline__ void run(const T* x, int32_t row, int32_t m, int32_t k,
                                             uint8_t* place, int32_t block_bytes, float* scales) {
    const int lane = threadIdx.x % kLanes;
    const int32_t first = threadIdx.x % 32 / kLanes;
    const int32_t padded_k = (k + kBlockK - 1) / kBlockK * kBlockK;
    // Beyond the sixteen rows nothing is read.
    const int32_t limit = min(m, row + kRows);
    Round now;
    Round next;
    load(now, x, row + first, limit, k, lane);
    load(next, x, row + first + kRoundRows, limit, k, lane);
#pragma unroll 1
    for (int32_t local = first; local < kRows; local += kRoundRows) {
      Round after;
      load(after, x, row + local + 2 * kRoundRows, limit, k, lane);
      store(now, place, block_bytes, scales, local, padded_k, lane);
      copy(now, next);
      copy(next, after);
    }
  }
};

// The quantizer of a K, at most 1024.
template <typename T>
__device__ __forceinline__ void quantize_16_rows(const T* x, int32_t row, int32_t m, int32_t k,
                                                 uint8_t* place, int32_t block_bytes,
                                                 float* scales) {
  if (k <= 128) {
    RowQuantizer<T, 16, 1>::run(x, row, m, k, place, block_bytes, scales);
  } else if (k <= 256) {
    RowQuantizer<T, 32, 1>::run(x, row, m, k, place, block_bytes, scales);
  } else if (k <= 512) {
    RowQuantizer<T, 32, 2>::run(x, row, m, k, place, block_bytes, scales);
  } else {
    RowQuantizer<T, 32, 4>::run(x, row, m, k, place, block_bytes, scales);
  }
}

}  // namespace int8_ops::cuda::sm90
