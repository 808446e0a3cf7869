// Which splits of which rows a block attends to: found on the device, where the lengths are.
#pragma once

#include "partials.h"

namespace int8_ops::cuda::attention {

// Splits of all rows, numbered row after row. A warp's lanes walk together.
struct SplitWalk {
  const LatentAttentionParams& p;
  int32_t b = 0;
  int32_t split = 0;
  DecodeRow row = {};

  static __device__ __forceinline__ int32_t splits_of(const LatentAttentionParams& p, int32_t b) {
    if (b >= p.batch) return 0;
    const DecodeRow row = decode_row(p, b);
    return row.last_split - row.first_split;
  }

  static __device__ __forceinline__ int32_t total(const LatentAttentionParams& p) {
    int32_t sum = 0;
    for (int32_t first = 0; first < p.batch; first += 32) {
      sum += splits_of(p, first + static_cast<int32_t>(threadIdx.x % 32));
    }
    return __reduce_add_sync(~0u, sum);
  }

  // To split number `number`; there is one.
  __device__ __forceinline__ void seek(int32_t number) {
    for (int32_t first = 0;; first += 32) {
      const int32_t mine = splits_of(p, first + static_cast<int32_t>(threadIdx.x % 32));
      int32_t upto = mine;
#pragma unroll
      for (int32_t step = 1; step < 32; step *= 2) {
        const int32_t below = __shfl_up_sync(~0u, upto, step);
        if (static_cast<int32_t>(threadIdx.x % 32) >= step) upto += below;
      }
      const uint32_t beyond = __ballot_sync(~0u, number < upto);
      if (beyond == 0) {
        number -= __shfl_sync(~0u, upto, 31);
        continue;
      }
      const int32_t lane = __ffs(static_cast<int32_t>(beyond)) - 1;
      b = first + lane;
      row = decode_row(p, b);
      split = row.first_split + number - __shfl_sync(~0u, upto - mine, lane);
      return;
    }
  }

  // To the next split; there is one.
  __device__ __forceinline__ void next() {
    ++split;
    while (split == row.last_split) {
      row = decode_row(p, ++b);
      split = row.first_split;
    }
  }

  __device__ __forceinline__ int32_t first_token() const {
    return row.begin + split * kSplitTokens;
  }
  __device__ __forceinline__ int32_t tokens() const {
    return min(kSplitTokens, row.end - first_token());
  }
};

}  // namespace int8_ops::cuda::attention
