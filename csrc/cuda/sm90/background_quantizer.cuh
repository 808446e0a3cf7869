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
#include "../ptx/rcp_approx.cuh"
#include "../ptx/tma.cuh"
#include "../quantize/row_math.cuh"
#include "gemm_args.cuh"

namespace int8_ops::cuda::sm90 {

inline constexpr int32_t kCountedRows = kSm90CountedRows;

// Waits until rows row .. of their 128 are quantized, and lets the copy engine see them.
__device__ __forceinline__ void wait_for_rows(const GemmArgs& args, int32_t row) {
  if (row >= args.m) return;
  const int32_t first = row / kCountedRows * kCountedRows;
  const auto wanted = static_cast<uint32_t>(min(kCountedRows, args.m - first));
  const uint32_t* const counter = args.done + row / kCountedRows;
  while (ptx::load_acquire(counter) < wanted) __nanosleep(64);
  ptx::fence_proxy_async_all();
}

// One warp's part: groups of kGroup rows, every `warps`-th from `index` on.
template <typename T>
struct BackgroundQuantizer {
  static constexpr int kGroup = sizeof(T) == 2 ? 4 : 2;
  static_assert(kCountedRows % kGroup == 0);

  const GemmArgs& args;
  const T* x;
  int lane;

  struct Group {
    Chunk<T> chunks[kGroup];
  };

  __device__ __forceinline__ void load(Group& group, int32_t row, int32_t col) const {
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
      if (row + r < args.m && col < args.k) {
        group.chunks[r].load_cached(x + static_cast<int64_t>(row + r) * args.k + col);
      } else {
        group.chunks[r].clear();
      }
    }
  }

  // The chunks of these rows whose rounding is not certain: see row_quantizer.cuh.
  __device__ __forceinline__ void repair(const float (&divisor)[kGroup], int32_t row, int32_t col,
                                         uint32_t doubts) const {
#pragma unroll 1
    for (; doubts != 0; doubts &= doubts - 1) {
      const int r = __ffs(static_cast<int>(doubts)) - 1;
      RowScale s;
      s.divisor = divisor[0];
#pragma unroll
      for (int other = 1; other < kGroup; ++other) {
        if (r == other) s.divisor = divisor[other];
      }
      s.inverse = __frcp_rn(s.divisor);
      const int64_t at = static_cast<int64_t>(row + r) * args.k + col;
      Chunk<T> again;
      again.load_cached(x + at);
      *reinterpret_cast<uint2*>(args.q + at) =
          quantize_chunk_by_division(again, RowDivision::by(s), true);
    }
  }

  // These rows come to L2.
  __device__ __forceinline__ void prefetch(int32_t row) const {
    if (lane != 0 || row >= args.m) return;
    const int64_t bytes = static_cast<int64_t>(min(kGroup, args.m - row)) * args.k * sizeof(T);
    ptx::prefetch_l2_bulk(x + static_cast<int64_t>(row) * args.k, static_cast<uint32_t>(bytes));
  }

  __device__ __forceinline__ void run_group(int32_t row) const {
    float amax[kGroup] = {};
    {
      Group now;
      load(now, row, lane * kChunk);
#pragma unroll 1
      for (int32_t col = lane * kChunk; col < args.k; col += 32 * kChunk) {
        Group next;
        load(next, row, col + 32 * kChunk);
#pragma unroll
        for (int r = 0; r < kGroup; ++r) amax[r] = ptx::max_nan_f32(amax[r], now.chunks[r].amax());
        now = next;
      }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
      for (int r = 0; r < kGroup; ++r) {
        amax[r] = ptx::max_nan_f32(amax[r], __shfl_xor_sync(0xffffffffu, amax[r], offset));
      }
    }
    float divisor[kGroup];
    RowBounds bounds[kGroup];
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
      const bool usable = amax[r] >= kMinUsableAmax;
      const bool finite = amax[r] <= kMaxFinite;
      divisor[r] = finite ? divide_by_127(amax[r]) : __int_as_float(0x7fc00000);
      bounds[r] = RowBounds::around(usable && finite ? ptx::rcp_approx(divisor[r]) : 0.0F);
      const float stored = finite && !usable ? 1.0F : divisor[r];
      if (lane == r && row + r < args.m) args.row_scales[row + r] = stored;
    }
    // x comes from cache this time.
    Group now;
    load(now, row, lane * kChunk);
#pragma unroll 1
    for (int32_t col = lane * kChunk; col < args.k; col += 32 * kChunk) {
      Group next;
      load(next, row, col + 32 * kChunk);
      uint32_t doubts = 0;
#pragma unroll
      for (int r = 0; r < kGroup; ++r) {
        uint32_t doubt = 0;
        const uint2 q = quantize_chunk(now.chunks[r], bounds[r], doubt);
        if (row + r < args.m) {
          auto* to = args.q + static_cast<int64_t>(row + r) * args.k + col;
          *reinterpret_cast<uint2*>(to) = divisor[r] <= kMaxFinite ? q : make_uint2(0, 0);
        }
        if (doubt != 0) doubts |= 1U << r;
      }
      if (__builtin_expect(doubts != 0, 0)) repair(divisor, row, col, doubts);
      now = next;
    }
    ptx::fence_proxy_async_all();
    __syncwarp();
    if (lane == 0) {
      ptx::add_release(args.done + row / kCountedRows,
                       static_cast<uint32_t>(min(kGroup, args.m - row)));
    }
  }

  static __device__ __forceinline__ void run(const GemmArgs& args, int32_t index, int32_t warps) {
    const BackgroundQuantizer quantizer{args, static_cast<const T*>(args.x),
                                        static_cast<int>(threadIdx.x % 32)};
#pragma unroll 1
    for (int32_t row = index * kGroup; row < args.m; row += warps * kGroup) {
      quantizer.prefetch(row + warps * kGroup);
      quantizer.run_group(row);
    }
  }
};

}  // namespace int8_ops::cuda::sm90
