// Which splits of which rows a block attends to: found on the device, where the lengths are.
#pragma once

#include "partials.h"

namespace int8_ops::cuda::attention {

// Splits of all rows, numbered row after row. A warp's lanes walk together, each with a row of its
// own at hand.
struct SplitWalk {
  const LatentAttentionParams& p;
  int32_t b = 0;
  int32_t split = 0;
  DecodeRow row = {};
  int32_t at_hand = -1;  // the first of 32 rows
  DecodeRow own = {};

  // Asks for 32 rows.
  __device__ __forceinline__ void take(int32_t first) {
    if (first == at_hand) return;
    at_hand = first;
    const int32_t mine = first + static_cast<int32_t>(threadIdx.x % 32);
    own = {};
    if (mine < p.batch) own = decode_row(p, mine);
  }
  __device__ __forceinline__ int32_t own_splits() const { return own.last_split - own.first_split; }
  __device__ __forceinline__ void go_to(int32_t number) {
    b = number;
    const int32_t lane = number % 32;
    row = {__shfl_sync(~0u, own.begin, lane), __shfl_sync(~0u, own.end, lane),
           __shfl_sync(~0u, own.first_split, lane), __shfl_sync(~0u, own.last_split, lane)};
    split = row.first_split;
  }

  __device__ __forceinline__ int32_t total() {
    int32_t sum = 0;
#pragma unroll 1
    for (int32_t first = 0; first < p.batch; first += 32) {
      take(first);
      sum += own_splits();
    }
    return __reduce_add_sync(~0u, sum);
  }

  // To split number `number`; there is one.
  __device__ __forceinline__ void seek(int32_t number) {
#pragma unroll 1
    for (int32_t first = 0;; first += 32) {
      take(first);
      int32_t upto = own_splits();
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
      number -= __shfl_sync(~0u, upto - own_splits(), lane);
      go_to(first + lane);
      split += number;
      return;
    }
  }

  // To the next split; there is one.
  __device__ __forceinline__ void next() {
    ++split;
    while (split == row.last_split) {
      take((b + 1) / 32 * 32);
      go_to(b + 1);
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
