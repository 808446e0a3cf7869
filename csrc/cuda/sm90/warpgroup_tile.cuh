// What a warpgroup does with a tile of 64 rows: products from shared memory, and the epilogue.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../epilogue/scale_epilogue.cuh"
#include "../ptx/cluster.cuh"
#include "../ptx/stmatrix.cuh"
#include "../ptx/tma.cuh"
#include "../ptx/wgmma_s8.cuh"

namespace int8_ops::cuda::sm90 {

inline constexpr int kBlockK = 128;  // bytes of a row in a stage: the period of the swizzle
inline constexpr int kWarpgroupM = 64;
inline constexpr int kWarpgroupThreads = 128;

// Barrier 0 is __syncthreads()'s.
enum NamedBarrier : uint32_t { kWarpgroupBarrier = 1 };  // and the next, one a warpgroup

// Where a tile's sums go.
struct TilePlace {
  int32_t row_first;   // of the warpgroup
  int32_t n_first;     // of the tile
  float row_scale[2];  // of this thread's two rows: see row_of_thread()
};

// What a tile's epilogue needs: scales of the columns, bias, and the scales of the rows where they
// are made beside the products.
template <int kBlockN>
struct TileFactors {
  float w_scale[kBlockN];
  alignas(16) uint8_t bias[kBlockN * 4];  // in its own dtype
  float row_scale[2 * kWarpgroupM];
};

// What a thread needs of kGroups groups of eight neighbouring columns: two of each.
template <int kGroups>
struct ColumnFactors {
  float2 w_scale[kGroups];
  float2 bias[kGroups];
};

// kStagedCols: columns of 16-bit results that are on their way to the copy engine at once.
template <int kBlockN, int kStagedCols>
struct WarpgroupTile {
  static constexpr int kSums = kBlockN / 2;
  using Sums = int32_t[kSums];
  using Factors = TileFactors<kBlockN>;

  // 16-bit results on their way to the copy engine: boxes of 64 rows by 64 columns, 128 bytes a
  // row, swizzled.
  static constexpr int kBoxCols = 64;
  static constexpr int kBoxBytes = kWarpgroupM * 128;
  static constexpr int kStagingBytes = kStagedCols / kBoxCols * kBoxBytes;

  // Starts sums (+)= a * w over one K-block and commits it as a group. The descriptors are those of
  // the block's first 32 columns of K.
  static __device__ __forceinline__ void multiply(Sums& sums, uint64_t a, uint64_t w,
                                                  bool accumulate) {
    ptx::wgmma_fence();
    ptx::wgmma_s8(sums, a, w, accumulate);
#pragma unroll
    for (int step = 1; step < kBlockK / 32; ++step) {
      ptx::wgmma_s8(sums, a + step * 2, w + step * 2, true);
    }
    ptx::wgmma_commit_group();
  }

  // This thread's first row of the warpgroup's 64; its other one is eight below.
  static __device__ __forceinline__ int row_of_thread() {
    return threadIdx.x % kWarpgroupThreads / 32 * 16 + threadIdx.x % 32 / 4;
  }

  using BoxFactors = ColumnFactors<kBoxCols / 8>;

  // Every load first, and no branch between them and the arithmetic. Without a bias -0 is added,
  // which changes nothing, not even a -0.
  static __device__ __forceinline__ BoxFactors box_factors(const Factors& factors, int first,
                                                           const ScaleEpilogue& epilogue) {
    const int col = first + threadIdx.x % 4 * 2;
    BoxFactors box;
#pragma unroll
    for (int i = 0; i < kBoxCols / 8; ++i) {
      box.w_scale[i] = *reinterpret_cast<const float2*>(&factors.w_scale[col + i * 8]);
      box.bias[i] = make_float2(-0.0F, -0.0F);
    }
    if (epilogue.bias == nullptr) return box;
    if (epilogue.bias_dtype == DType::kFloat32) {
#pragma unroll
      for (int i = 0; i < kBoxCols / 8; ++i) {
        box.bias[i] = *reinterpret_cast<const float2*>(&factors.bias[(col + i * 8) * 4]);
      }
      return box;
    }
    const bool half = epilogue.bias_dtype == DType::kFloat16;
#pragma unroll
    for (int i = 0; i < kBoxCols / 8; ++i) {
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(&factors.bias[(col + i * 8) * 2]);
      const float2 as_half = __half22float2(*reinterpret_cast<const __half2*>(&pair));
      box.bias[i].x = half ? as_half.x : __uint_as_float(pair << 16);
      box.bias[i].y = half ? as_half.y : __uint_as_float(pair & 0xffff0000u);
    }
    return box;
  }

  // Group of eight columns `n8` of the tile, `i` of the factors; row half `half`.
  template <int kGroups, bool kBias = true>
  static __device__ __forceinline__ float2 scaled_pair(const Sums& sums, int n8, int i, int half,
                                                       const ColumnFactors<kGroups>& factors,
                                                       float row_scale) {
    const int32_t* const pair = &sums[n8 * 4 + half * 2];
    const float x = ScaleEpilogue::scaled(pair[0], row_scale, factors.w_scale[i].x);
    const float y = ScaleEpilogue::scaled(pair[1], row_scale, factors.w_scale[i].y);
    if constexpr (!kBias) return make_float2(x, y);
    return make_float2(__fadd_rn(x, factors.bias[i].x), __fadd_rn(y, factors.bias[i].y));
  }

  // To 16-bit results: through shared memory, by the copy engine, which clips at the edges.
  template <DType kOut>
  static __device__ __forceinline__ void store_16bit(const Sums& sums,
                                                     const ScaleEpilogue& epilogue,
                                                     const Factors& factors, const TilePlace& place,
                                                     const CUtensorMap* out_map, uint32_t staging) {
    const int thread = threadIdx.x % kWarpgroupThreads;
    const uint32_t barrier = kWarpgroupBarrier + threadIdx.x / kWarpgroupThreads;
    const int lane = thread % 32;
    // Matrix lane / 8 of a stmatrix: rows 8 (lane / 8 % 2) .., columns 8 (lane / 16) ...
    const int row = thread / 32 * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
    for (int first = 0; first < kBlockN; first += kStagedCols) {
      // The copy engine has read what was staged here before.
      if (thread == 0) ptx::bulk_wait_group_read<0>();
      ptx::named_barrier_sync(barrier, kWarpgroupThreads);
#pragma unroll
      for (int box_first = first; box_first < first + kStagedCols; box_first += kBoxCols) {
        const BoxFactors box = box_factors(factors, box_first, epilogue);
        const uint32_t to_row = staging + (box_first - first) / kBoxCols * kBoxBytes + row * 128;
#pragma unroll
        for (int pair = 0; pair < kBoxCols / 16; ++pair) {
          uint32_t words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int n8 = pair * 2 + i / 2;
            const float2 y =
                scaled_pair(sums, box_first / 8 + n8, n8, i % 2, box, place.row_scale[i % 2]);
            words[i] = pack_16bit(kOut, y.x, y.y);
          }
          const int chunk = pair * 2 + lane / 16;
          ptx::stmatrix_x4(to_row + ((chunk ^ (row % 8)) * 16), words);
        }
      }
      ptx::fence_proxy_async();
      ptx::named_barrier_sync(barrier, kWarpgroupThreads);
      if (thread == 0) {
#pragma unroll
        for (int col = 0; col < kStagedCols; col += kBoxCols) {
          const int32_t n = place.n_first + first + col;
          if (n < epilogue.n) {
            ptx::tma_store_2d(out_map, staging + col / kBoxCols * kBoxBytes, n, place.row_first);
          }
        }
        ptx::bulk_commit_group();
      }
    }
  }

  // To 32-bit results: a quad of threads stores a whole sector.
  template <DType kOut>
  static __device__ __forceinline__ void store_32bit(const Sums& sums,
                                                     const ScaleEpilogue& epilogue,
                                                     const Factors& factors,
                                                     const TilePlace& place) {
#pragma unroll
    for (int box_first = 0; box_first < kBlockN; box_first += kBoxCols) {
      BoxFactors box = {};
      if constexpr (kOut != DType::kInt32) box = box_factors(factors, box_first, epilogue);
      store_groups_32bit<kOut>(sums, epilogue, box_first / 8, box, place);
    }
  }

  // Groups of eight columns from `first_n8` on.
  template <DType kOut, int kGroups>
  static __device__ __forceinline__ void store_groups_32bit(const Sums& sums,
                                                            const ScaleEpilogue& epilogue,
                                                            int first_n8,
                                                            const ColumnFactors<kGroups>& factors,
                                                            const TilePlace& place) {
    const int32_t col_first = place.n_first + threadIdx.x % 4 * 2;
    const int32_t row_first = place.row_first + row_of_thread();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t row = row_first + half * 8;
      const int64_t at = static_cast<int64_t>(row) * epilogue.n + col_first;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const int n8 = first_n8 + i;
        if (row >= epilogue.m || col_first + n8 * 8 >= epilogue.n) continue;
        if constexpr (kOut == DType::kInt32) {
          *reinterpret_cast<int2*>(static_cast<int32_t*>(epilogue.out) + at + n8 * 8) =
              make_int2(sums[n8 * 4 + half * 2], sums[n8 * 4 + half * 2 + 1]);
        } else {
          *reinterpret_cast<float2*>(static_cast<float*>(epilogue.out) + at + n8 * 8) =
              scaled_pair(sums, n8, i, half, factors, place.row_scale[half]);
        }
      }
    }
  }
};

}  // namespace int8_ops::cuda::sm90
