// Quantization beside the products: the idle warps of all blocks turn x [m, k] into int8 rows in
// global memory (in effect in L2), from the first row on, and count what is done in every 128 rows.
// The copy engine's thread of a block waits for the count of the rows that it is about to load.
//
// Nobody waits for a warp that waits: these warps depend on nothing but their own loads, so the
// rows come whatever the others do.
#pragma once

#include <cstdint>

#include "../heuristics/sm90_tiles.h"
#include "../ptx/counter.cuh"
#include "../ptx/tma.cuh"
#include "gemm_args.cuh"
#include "row_round.cuh"

namespace int8_ops::cuda::sm90 {

inline constexpr int32_t kCountedRows = kSm90CountedRows;

// Waits until rows row .. of their 128 are quantized, and lets the copy engine see them.
__device__ __forceinline__ void wait_for_rows(const GemmArgs& args, int32_t row) {
  if (row >= args.m) return;
  const int32_t first = row / kCountedRows * kCountedRows;
  const auto wanted = static_cast<uint32_t>(min(kCountedRows, args.m - first));
  const uint32_t* const counter = args.done + row / kCountedRows;
  while (ptx::load_acquire(counter) < wanted) __nanosleep(100);
  ptx::fence_proxy_async_all();
}

template <typename T>
struct BackgroundQuantizer {
  // Chunks in a thread's registers.
  static constexpr int kHeld = sizeof(T) == 2 ? 8 : 4;

  const GemmArgs& args;
  const T* x;
  int32_t warps;  // that draw

  // The first row of the next round that nobody has; from args.m on where there is none. Drawn a
  // round before it is used: the answer takes a while.
  __device__ __forceinline__ int32_t draw(int32_t rows) const {
    uint32_t ticket = 0;
    if (threadIdx.x % 32 == 0) ticket = ptx::fetch_add(args.drawn, 1);
    ticket = __shfl_sync(0xffffffffu, ticket, 0);
    // Each warp draws two rounds too many at most: no wrap below 2^31 rows.
    const int64_t row = static_cast<int64_t>(ticket) * rows;
    return row < args.m ? static_cast<int32_t>(row) : args.m;
  }

  // Rows first .. of `rows` are written: says so to all blocks.
  __device__ __forceinline__ void count(int32_t first, int32_t rows) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0 && first < args.m) {
      ptx::add_release(args.done + first / kCountedRows,
                       static_cast<uint32_t>(min(rows, args.m - first)));
    }
  }

  // These rows come to L2.
  __device__ __forceinline__ void prefetch(int32_t first, int32_t rows) const {
    if (threadIdx.x % 32 != 0 || first >= args.m) return;
    const int64_t bytes =
        static_cast<int64_t>(min(rows, args.m - first)) * args.k * static_cast<int64_t>(sizeof(T));
    ptx::prefetch_l2_bulk(x + static_cast<int64_t>(first) * args.k, static_cast<uint32_t>(bytes));
  }

  // Rows that fit the registers: read once, a round ahead.
  template <int kLanes, int kChunks>
  __device__ __forceinline__ void run_held() const {
    using Round = RowRound<T, kLanes, kChunks, kHeld / kChunks>;
    static_assert(kCountedRows % Round::kRows == 0);
    int32_t row = draw(Round::kRows);
    int32_t next_row = draw(Round::kRows);
    int32_t done = args.m;  // rows that were written and not counted yet
    Round now;
    now.template load<true>(x, row, args.m, args.k, args.k);
#pragma unroll 1
    while (row < args.m) {
      Round next;
      next.template load<true>(x, next_row, args.m, args.k, args.k);
      prefetch(next_row + warps * Round::kRows, Round::kRows);
      const int32_t after = draw(Round::kRows);
      const auto factors = now.find_factors([&](int32_t r, float scale) {
        if (row + r < args.m) args.row_scales[row + r] = scale;
      });
      // Late: counting waits for the stores of those rows.
      count(done, Round::kRows);
      const auto place_of = [&](int32_t r) {
        int8_t* const to = args.q + static_cast<int64_t>(row + r) * args.k;
        return row + r < args.m ? to + Round::lane() * kChunk : nullptr;
      };
      now.quantize(factors, args.k, kLanes * kChunk, place_of);
      done = row;
      row = next_row;
      next_row = after;
      now = next;
    }
    count(done, Round::kRows);
  }

  // Longer rows: read twice, the second time from cache.
  __device__ __forceinline__ void run_long() const {
    constexpr int kChunks = 2;
    constexpr int kRows = kHeld / kChunks;
    using Round = RowRound<T, 32, kChunks, kRows>;
    static_assert(kCountedRows % kRows == 0);
    constexpr int32_t kStep = 32 * kChunks * kChunk;
#pragma unroll 1
    for (int32_t row = draw(kRows); row < args.m;) {
      const int32_t next_row = draw(kRows);
      prefetch(next_row, kRows);
      const auto load = [&](Round& round, int32_t col) {
        round.template load<true>(x + col, row, args.m, args.k, args.k - col);
      };
      Round now;
      Round next;
      typename Chunk<T>::Amax packed[kRows] = {};
      load(now, 0);
#pragma unroll 1
      for (int32_t col = 0; col < args.k; col += kStep) {
        load(next, col + kStep);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int i = 0; i < kChunks; ++i) now.chunks[r][i].add_to(packed[r]);
        }
        now = next;
      }
      load(now, 0);
      const auto factors = Round::factors_of(packed, [&](int32_t r, float scale) {
        if (row + r < args.m) args.row_scales[row + r] = scale;
      });
#pragma unroll 1
      for (int32_t col = 0; col < args.k; col += kStep) {
        load(next, col + kStep);
        const auto place_of = [&](int32_t r) {
          int8_t* const to = args.q + static_cast<int64_t>(row + r) * args.k + col;
          return row + r < args.m ? to + Round::lane() * kChunk : nullptr;
        };
        now.quantize(factors, args.k - col, 32 * kChunk, place_of);
        now = next;
      }
      count(row, kRows);
      row = next_row;
    }
  }

  static __device__ __forceinline__ void run(const GemmArgs& args, int32_t warps) {
    const BackgroundQuantizer quantizer{args, static_cast<const T*>(args.x), warps};
    if (args.k <= 128) {
      quantizer.template run_held<16, 1>();
    } else if (args.k <= 256) {
      quantizer.template run_held<32, 1>();
    } else if (args.k <= 512) {
      quantizer.template run_held<32, 2>();
    } else if (args.k <= 1024) {
      quantizer.template run_held<32, 4>();
    } else {
      quantizer.run_long();
    }
  }
};

}  // namespace int8_ops::cuda::sm90
