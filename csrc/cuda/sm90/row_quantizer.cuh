// Quantization on the way into shared memory: sixteen rows of x a warp, read once from global
// memory, written as int8 where wgmma reads them.
#pragma once

#include <cstdint>

#include "../ptx/rcp_approx.cuh"
#include "../quantize/row_math.cuh"
#include "warpgroup_tile.cuh"

namespace int8_ops::cuda::sm90 {

// Rows of up to kLanes * kChunks * 8 values; kLanes neighbouring lanes share one. Four chunks a
// thread make a round. The loop is rolled: straight-line code for sixteen rows would run from cold
// instruction memory. It is software-pipelined: while a round is quantized, the scales of the next
// are found and the rounds after it are loaded.
template <typename T, int kLanes, int kChunks>
struct RowQuantizer {
  static constexpr int kRows = 16;
  static constexpr int kRowsPerPass = 32 / kLanes;
  static constexpr int kPasses = 4 / kChunks;
  static constexpr int kRoundRows = kPasses * kRowsPerPass;
  static_assert(kRows % kRoundRows == 0);

  struct Round {
    Chunk<T> chunks[kPasses][kChunks];
  };

  // Of each pass's row.
  struct Factors {
    float divisor[kPasses];  // not finite where the row is not
    float inverse[kPasses];  // about 1 / divisor, or 0
  };

  const T* x;
  int32_t row;
  int32_t limit;  // rows from here on are zeros
  int32_t k;
  int32_t padded_k;
  uint8_t* place;  // of row 0 of the warp's sixteen in its first K-block
  int32_t block_bytes;
  float* scales;
  int lane;  // among those that share a row

  __device__ __forceinline__ void load(Round& round, int32_t local) const {
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const int32_t r = row + local + p * kRowsPerPass;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const int32_t col = (i * kLanes + lane) * kChunk;
        if (r < limit && col < k) {
          round.chunks[p][i].load(x + static_cast<int64_t>(r) * k + col);
        } else {
          round.chunks[p][i].clear();
        }
      }
    }
  }

  __device__ __forceinline__ Factors find_factors(const Round& round, int32_t local) const {
    float amax[kPasses];
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      amax[p] = round.chunks[p][0].amax();
#pragma unroll
      for (int i = 1; i < kChunks; ++i) {
        amax[p] = ptx::max_nan_f32(amax[p], round.chunks[p][i].amax());
      }
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        amax[p] = ptx::max_nan_f32(amax[p], __shfl_xor_sync(0xffffffffu, amax[p], offset));
      }
    }
    Factors f;
    float stored = 0.0F;
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const bool usable = amax[p] >= kMinUsableAmax;
      f.divisor[p] = divide_by_127(amax[p]);
      f.inverse[p] = usable ? ptx::rcp_approx(f.divisor[p]) : 0.0F;
      const float own = usable ? f.divisor[p] : 1.0F;
      if (lane == p) stored = amax[p] <= kMaxFinite ? own : __int_as_float(0x7fc00000);
      if (!(amax[p] <= kMaxFinite)) f.divisor[p] = __int_as_float(0x7fc00000);
    }
    if (lane < kPasses && local < kRows) scales[local + lane * kRowsPerPass] = stored;
    return f;
  }

  __device__ __forceinline__ uint8_t* place_of(int32_t r, int32_t chunk) const {
    // Sixteen chunks a K-block; two make sixteen bytes, whose place is swizzled.
    const int32_t sixteen = (chunk % 16 / 2) ^ (r % 8);
    return place + chunk / 16 * block_bytes + r * kBlockK + sixteen * 16 + chunk % 2 * 8;
  }

  __device__ __forceinline__ void write(const Round& round, const Factors& f, int32_t local) const {
    uint32_t doubts = 0;
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const RowBounds bounds = RowBounds::around(f.inverse[p]);
      const bool finite = f.divisor[p] <= kMaxFinite;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        uint32_t doubt = 0;
        const uint2 q = quantize_chunk(round.chunks[p][i], bounds, doubt);
        const int32_t chunk = i * kLanes + lane;
        if (chunk * kChunk < padded_k) {
          *reinterpret_cast<uint2*>(place_of(local + p * kRowsPerPass, chunk)) =
              finite ? q : make_uint2(0, 0);
        }
        if (doubt != 0) doubts |= 1U << (p * kChunks + i);
      }
    }
    // One branch a round, so that all above is one block for the scheduler, and the code of one
    // chunk, so that little lies between what runs: x comes from memory again.
    if (__builtin_expect(doubts != 0, 0)) repair(f, local, doubts);
  }

  __device__ __forceinline__ void repair(const Factors& f, int32_t local, uint32_t doubts) const {
#pragma unroll 1
    for (; doubts != 0; doubts &= doubts - 1) {
      const int index = __ffs(static_cast<int>(doubts)) - 1;
      const int p = index / kChunks;
      const int32_t chunk = index % kChunks * kLanes + lane;
      RowScale s;
      s.divisor = f.divisor[0];
#pragma unroll
      for (int other = 1; other < kPasses; ++other) {
        if (p == other) s.divisor = f.divisor[other];
      }
      s.inverse = __frcp_rn(s.divisor);
      const int32_t r = local + p * kRowsPerPass;
      Chunk<T> again;
      again.load(x + static_cast<int64_t>(row + r) * k + chunk * kChunk);
      *reinterpret_cast<uint2*>(place_of(r, chunk)) =
          quantize_chunk_by_division(again, RowDivision::by(s), true);
    }
  }

  __device__ __forceinline__ void run() const {
    const int32_t first = threadIdx.x % 32 / kLanes;
    Round now;
    Round next;
    load(now, first);
    load(next, first + kRoundRows);
    Factors factors = find_factors(now, first);
#pragma unroll 1
    for (int32_t local = first; local < kRows; local += kRoundRows) {
      Round after;
      load(after, local + 2 * kRoundRows);
      const Factors next_factors = find_factors(next, local + kRoundRows);
      write(now, factors, local);
      now = next;
      next = after;
      factors = next_factors;
    }
  }
};

template <int kLanes, int kChunks, typename T>
__device__ __forceinline__ void run_row_quantizer(const T* x, int32_t row, int32_t m, int32_t k,
                                                  uint8_t* place, int32_t block_bytes,
                                                  float* scales) {
  using Quantizer = RowQuantizer<T, kLanes, kChunks>;
  // Beyond the sixteen rows nothing is read.
  const int32_t limit = min(m, row + Quantizer::kRows);
  const int32_t padded_k = (k + kBlockK - 1) / kBlockK * kBlockK;
  const int lane = threadIdx.x % kLanes;
  Quantizer{x, row, limit, k, padded_k, place, block_bytes, scales, lane}.run();
}

// Rows row .. row + 15 of x [m, k], by one warp; what lies beyond m or k becomes zeros. K-blocks of
// the result are block_bytes apart. k is at most 1024.
template <typename T>
__device__ __forceinline__ void quantize_16_rows(const T* x, int32_t row, int32_t m, int32_t k,
                                                 uint8_t* place, int32_t block_bytes,
                                                 float* scales) {
  if (k <= 128) {
    run_row_quantizer<16, 1>(x, row, m, k, place, block_bytes, scales);
  } else if (k <= 256) {
    run_row_quantizer<32, 1>(x, row, m, k, place, block_bytes, scales);
  } else if (k <= 512) {
    run_row_quantizer<32, 2>(x, row, m, k, place, block_bytes, scales);
  } else {
    run_row_quantizer<32, 4>(x, row, m, k, place, block_bytes, scales);
  }
}

}  // namespace int8_ops::cuda::sm90
