// What a warpgroup does with the sums of 64 columns of w times 64 rows: scale, round, store. They
// come as [columns, rows], and leave as [rows, columns].
#pragma once

#include "../heuristics/sm90_tiles.h"
#include "../ptx/cluster.cuh"
#include "../ptx/opaque.cuh"
#include "../ptx/stmatrix.cuh"
#include "../ptx/tma.cuh"
#include "gemm_args.cuh"

namespace int8_ops::cuda::sm90 {

template <DType kOut>
struct TransposedEpilogue {
  static constexpr int kTileRows = StationaryTile::kBlockM;
  static constexpr int kWarpgroup = 128;
  static constexpr int kStagedBytes =
      kTileRows * StationaryTile::kUnitColumns;  // of 16-bit results
  static constexpr uint32_t kStagedBarrier = 6;  // and the next, one a warpgroup

  using Sums = int32_t[kTileRows / 2];

  const GemmArgs& args;
  float* w_scales;  // [units][128]
  float* bias;      // [units][128]
  int32_t n_first;  // of this block

  // Of this thread's two columns, eight apart.
  struct ColumnFactors {
    float w_scale[2];
    float bias[2];
  };
  template <bool kBias>
  __device__ __forceinline__ ColumnFactors column_factors(int32_t first) const {
    const int32_t col = first + threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
    ColumnFactors f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      f.w_scale[half] = w_scales[col + half * 8];
      if constexpr (kBias) f.bias[half] = bias[col + half * 8];
    }
    return f;
  }

  // sums[4 g + 2 h + e]: row 8 g + 2 (lane % 4) + e of the tile, column lane / 4 + 8 h of the
  // warp's sixteen.
  template <bool kBias>
  static __device__ __forceinline__ float scaled(const Sums& sums, int i, const float2& row_scale,
                                                 const ColumnFactors& f) {
    const float y = ScaleEpilogue::scaled(sums[i], i % 2 == 0 ? row_scale.x : row_scale.y,
                                          f.w_scale[i / 2 % 2]);
    if constexpr (!kBias) return y;
    return __fadd_rn(y, f.bias[i / 2 % 2]);
  }

  // `first`: of the product's columns in the block.
  __device__ __forceinline__ void store(const Sums& sums, const float* scales, int32_t row_first,
                                        int32_t first, int warpgroup, uint32_t box) const {
    if constexpr (size_of(kOut) == 2) {
      if (args.epilogue.bias == nullptr) {
        stage<false>(sums, scales, first, box);
      } else {
        stage<true>(sums, scales, first, box);
      }
      ptx::fence_proxy_async();
      ptx::named_barrier_sync(kStagedBarrier + warpgroup, kWarpgroup);
      if (threadIdx.x % kWarpgroup == 0) {
        if (n_first + first < args.n) {
          ptx::tma_store_2d(&args.out_map, box, n_first + first, row_first);
        }
        ptx::bulk_commit_group();
        // The other box may be written after the next turn, at which the warpgroup meets.
        ptx::bulk_wait_group_read<StationaryTile::kStagedBoxes - 1>();
      }
    } else {
      store_32bit(sums, scales, row_first, first);
    }
  }

  // 16-bit results of a product to shared memory, a row of the tile a line, swizzled.
  template <bool kBias>
  __device__ __forceinline__ void stage(const Sums& sums, const float* scales, int32_t first,
                                        uint32_t box) const {
    const ColumnFactors factors = column_factors<kBias>(first);
    const int lane = threadIdx.x % 32;
    // Matrix lane / 8 of a stmatrix: columns 8 (lane / 8 % 2) .., rows 8 (lane / 16) ...
    const int row = lane / 16 * 8 + lane % 8;
    const int chunk = threadIdx.x % kWarpgroup / 32 * 2 + lane / 8 % 2;
    const uint32_t to = box + row * 128 + ((chunk ^ (row % 8)) * 16);
#pragma unroll
    for (int g = 0; g < kTileRows / 8; g += 2) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 row_scale =
            *reinterpret_cast<const float2*>(&scales[(g + i / 2) * 8 + threadIdx.x % 4 * 2]);
        const int sum = g * 4 + i * 2;
        words[i] = pack_16bit(kOut, scaled<kBias>(sums, sum, row_scale, factors),
                              scaled<kBias>(sums, sum + 1, row_scale, factors));
      }
      ptx::stmatrix_x4_trans(to + g * 8 * 128, words);
    }
  }

  // Eight lanes store a sector.
  __device__ __forceinline__ void store_32bit(const Sums& sums, const float* scales,
                                              int32_t row_first, int32_t first) const {
    const ColumnFactors factors = column_factors<true>(first);
    auto thread = static_cast<int32_t>(threadIdx.x % kWarpgroup);
    ptx::make_opaque(thread);
    const int32_t col = n_first + first + thread / 32 * 16 + thread % 32 / 4;
    const int32_t row = row_first + thread % 4 * 2;
    using Out = std::conditional_t<kOut == DType::kInt32, int32_t, float>;
    auto* to = static_cast<Out*>(args.epilogue.out) + int64_t{row} * args.n + col;
    const float* row_scales = scales + thread % 4 * 2;
#pragma unroll
    for (int i = 0; i < kTileRows / 2; ++i) {
      const bool in = row + i / 4 * 8 + i % 2 < args.m && col + i / 2 % 2 * 8 < args.n;
      Out y;
      if constexpr (kOut == DType::kInt32) {
        y = sums[i];
      } else {
        y = scaled<true>(sums, i, *reinterpret_cast<const float2*>(row_scales), factors);
      }
      if (in) to[i % 2 * args.n + i / 2 % 2 * 8] = y;
      if (i % 4 == 3) to += int64_t{8} * args.n, row_scales += 8;
    }
  }
};

}  // namespace int8_ops::cuda::sm90
