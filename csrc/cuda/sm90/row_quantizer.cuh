// Quantization on the way into shared memory: sixteen rows of x a warp, read once from global
// memory, written as int8 where wgmma reads them.
#pragma once

#include <cstdint>

#include "row_round.cuh"
#include "warpgroup_tile.cuh"

namespace int8_ops::cuda::sm90 {

// Rows of up to kLanes * kChunks * 8 values, four chunks a thread at a time. The loop is rolled:
// straight-line code for sixteen rows would run from cold instruction memory. It is software-
// pipelined: while a round is quantized, the scales of the next are found and the one after it is
// loaded.
template <typename T, int kLanes, int kChunks>
struct RowQuantizer {
  static constexpr int kRows = 16;
  using Round = RowRound<T, kLanes, kChunks, 4 / kChunks>;
  static_assert(kRows % Round::kRows == 0);

  const T* x;     // the warp's first row
  int32_t limit;  // rows of it that exist
  int32_t k;
  int32_t padded_k;
  uint8_t* place;  // of row 0 in its first K-block
  int32_t block_bytes;
  float* scales;

  __device__ __forceinline__ typename Round::Factors find_factors(const Round& round,
                                                                  int32_t local) const {
    return round.find_factors([&](int32_t row, float scale) {
      if (local < kRows) scales[local + row] = scale;
    });
  }

  __device__ __forceinline__ void run() const {
    Round now;
    Round next;
    now.template load<false>(x, 0, limit, k, k);
    next.template load<false>(x, Round::kRows, limit, k, k);
    typename Round::Factors factors = find_factors(now, 0);
#pragma unroll 1
    for (int32_t local = 0; local < kRows; local += Round::kRows) {
      Round after;
      after.template load<false>(x, local + 2 * Round::kRows, limit, k, k);
      const typename Round::Factors next_factors = find_factors(next, local + Round::kRows);
      // Sixteen chunks a K-block; two make sixteen bytes, whose place is swizzled.
      const auto place_of = [&](int32_t row) {
        const int32_t r = local + row;
        const int lane = Round::lane();
        const int32_t sixteen = (lane % 16 / 2) ^ (r % 8);
        return reinterpret_cast<int8_t*>(place + lane / 16 * block_bytes + r * kBlockK +
                                         sixteen * 16 + lane % 2 * 8);
      };
      now.quantize(factors, padded_k, kLanes / 16 * block_bytes, place_of);
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
  const int32_t limit = min(m - row, Quantizer::kRows);
  const int32_t padded_k = (k + kBlockK - 1) / kBlockK * kBlockK;
  Quantizer{x + static_cast<int64_t>(row) * k, limit, k, padded_k, place, block_bytes, scales}
      .run();
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
