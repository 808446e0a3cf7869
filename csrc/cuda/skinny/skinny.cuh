// The kernel for few rows: int8_linear and int8_scaled_mm in one launch, bound by the weights.
//
//   w: global ---------------------> ring in shared memory --+
//                                                            mma --> sums --> epilogue --> global
//   x: global --> quantize --> rows in shared memory --------+
//
// w is mma's second operand, whose two registers a lane take two neighbouring words of one row of
// w, so that it is multiplied as it lies: Note [Any order of k]. The first operand's four registers
// mix two rows: that falls to x. (Rows of w as the first operand would halve the products of eight
// rows of x, and make every one of them wait for moves. There are products to spare.)
//
// A block keeps its rows of x and takes one tile of columns after another. Its loads of w are under
// way while it quantizes: device memory does not wait for that.
#pragma once

#include "../../common/params.h"
#include "../epilogue/column_factors.cuh"
#include "../launch.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/mma_s8.cuh"
#include "row_loader.cuh"
#include "skinny_args.cuh"
#include "weight_stream.cuh"

namespace int8_ops::cuda::skinny {

// T: dtype of x; int8: a is given, with its scales.
template <SkinnyTile kTile, typename T>
struct SkinnyKernel {
  static constexpr int kBlockK = SkinnyTile::kBlockK;
  static constexpr int kSteps = kTile.steps;
  static constexpr int kThreads = kTile.threads();
  static constexpr int kGroups = (kTile.rows + 15) / 16;  // of rows of x, the m of an mma
  static constexpr bool kHalf = kTile.rows == 8;          // only the upper half of the m is used

  using Shared = SharedStorage<kTile>;
  using Stream = WeightStream<kTile>;
  using Sums = int32_t[kGroups][2][4];  // two n8 tiles a warp

  static_assert(kHalf || kTile.rows % 16 == 0, "an mma takes 16 rows of x");
  static_assert(kTile.cols() <= kThreads && kTile.rows <= kThreads,
                "one thread a column and one a row fetch the scales");
  static_assert(sizeof(Shared) == kTile.fixed_bytes(), "the host asks for what is used");

  // Offsets of this lane's 16 bytes of K-block 0 in the rows of x: rows g and g + 8 of each group.
  using LaneRows = int32_t[kGroups][2];

  // A K-block: two k32 steps.
  static __device__ __forceinline__ void multiply(Sums& sums, const typename Stream::Block& w,
                                                  const uint8_t* x, const LaneRows& rows) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const uint4 upper = *reinterpret_cast<const uint4*>(x + rows[i][0]);
      uint4 lower = make_uint4(0, 0, 0, 0);
      if constexpr (!kHalf) lower = *reinterpret_cast<const uint4*>(x + rows[i][1]);
      const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
      const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
      ptx::mma_m16n8k32_s8(sums[i][0], first, w.low.x, w.low.y);
      ptx::mma_m16n8k32_s8(sums[i][1], first, w.high.x, w.high.y);
      ptx::mma_m16n8k32_s8(sums[i][0], second, w.low.z, w.low.w);
      ptx::mma_m16n8k32_s8(sums[i][1], second, w.high.z, w.high.w);
    }
  }

  static __device__ __forceinline__ void put_sums(const Sums& sums,
                                                  int32_t (&to)[kTile.rows][SkinnyTile::kSumPitch],
                                                  int lane) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int half = 0; half < (kHalf ? 1 : 2); ++half) {
        int32_t* const row = to[16 * i + 8 * half + lane / 4];
#pragma unroll
        for (int n8 = 0; n8 < 2; ++n8) {
          const int32_t (&from)[4] = sums[i][n8];
          *reinterpret_cast<int2*>(row + 8 * n8 + lane % 4 * 2) =
              make_int2(from[2 * half], from[2 * half + 1]);
        }
      }
    }
  }

  // Eight neighbouring columns of a row a thread, summed over the K-warps.
  static __device__ __forceinline__ void store(const ScaleEpilogue& epilogue, const Shared& shared,
                                               int32_t m_first, int32_t n_first, int32_t rows) {
    constexpr unsigned kOctets = kTile.cols() / 8;  // a row
    static_assert(kTile.rows * kOctets <= kThreads, "one each is enough");
    const int row = static_cast<int>(threadIdx.x / kOctets);
    const int octet = static_cast<int>(threadIdx.x % kOctets);
    if (row >= rows) return;
    int32_t acc[8] = {};
#pragma unroll
    for (int k = 0; k < kTile.warps_k; ++k) {
      const auto* const from =
          reinterpret_cast<const int4*>(&shared.sums[octet / 2][k][row][octet % 2 * 8]);
      const int4 lo = from[0];
      const int4 hi = from[1];
      const int32_t part[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
      for (int e = 0; e < 8; ++e) acc[e] += part[e];
    }
    const float a_scale = shared.factors.a_scale[row];
    const auto columns = shared.factors.columns(octet * 8);
    epilogue.with_out_dtype([&]<DType kOut, bool kVector>() {
      epilogue.store_x8<kOut, kVector>(m_first + row, n_first + octet * 8, acc, a_scale, columns);
    });
  }

  static __device__ __forceinline__ void run(const SkinnyArgs& args) {
    extern __shared__ __align__(128) uint8_t storage[];
    Shared& shared = *reinterpret_cast<Shared*>(storage);
    uint8_t* const q = storage + sizeof(Shared);
    ptx::grid_dependency_wait();

    const unsigned thread = threadIdx.x;
    const int lane = static_cast<int>(thread % 32);
    const int warp_n = static_cast<int>(thread / 32 % kTile.warps_n);
    const int warp_k = static_cast<int>(thread / 32 / kTile.warps_n);
    const int32_t m_first = static_cast<int32_t>(blockIdx.y) * kTile.rows;
    const int32_t rows = min(kTile.rows, args.epilogue.m - m_first);
    const int32_t k_begin = min(args.k, warp_k * args.k_blocks_per_warp * kBlockK);
    const int32_t k_end = min(args.k, k_begin + args.k_blocks_per_warp * kBlockK);
    const int32_t k_blocks = (k_end - k_begin + kBlockK - 1) / kBlockK;

    // x first: its way is the longer one, and behind the weights it would wait for all of them.
    RowLoader<kTile, T> loader(args, shared, q, m_first, rows);
    Stream stream(args, shared.ring[thread / 32], warp_n * 16, k_begin, k_blocks, lane);
    int32_t tile = static_cast<int32_t>(blockIdx.x);
    ColumnFactors factors;
    if (thread < kTile.cols()) factors.load(args.epilogue, tile * kTile.cols() + thread);
    loader.template finish<kSteps>(args.epilogue.a_scale);

    // Rows that are not there repeat the last one; their sums are not stored.
    LaneRows lane_rows;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t row = min(16 * i + 8 * half + lane / 4, rows - 1);
        lane_rows[i][half] = row * args.row_stride + lane % 4 * 16;
      }
    }

    while (true) {
      const int32_t n_first = tile * kTile.cols();
      const int32_t next_tile = tile + static_cast<int32_t>(gridDim.x);
      const bool last = next_tile >= args.col_tiles;
      Sums sums = {};
      const uint8_t* x = q + k_begin;
      for (int32_t block = 0; block < k_blocks; ++block, x += kBlockK) {
        const auto w = stream.take();
        multiply(sums, w, x, lane_rows);
        stream.copy_next();
      }

      if (tile != static_cast<int32_t>(blockIdx.x)) __syncthreads();  // the last sums were read
      put_sums(sums, shared.sums[warp_n][warp_k], lane);
      if (thread < kTile.cols()) {
        shared.factors.w_scale[thread] = factors.w_scale();
        shared.factors.bias[thread] = factors.bias(args.epilogue);
        if (!last) factors.load(args.epilogue, next_tile * kTile.cols() + thread);
      }
      __syncthreads();
      if (last) ptx::grid_dependency_trigger();
      store(args.epilogue, shared, m_first, n_first, rows);
      if (last) return;
      tile = next_tile;
    }
  }
};

// By index: nvcc's host stubs cannot spell a template argument of class type.
template <int kTileIndex, typename T>
__global__ void __launch_bounds__(kSkinnyTiles[kTileIndex].threads(),
                                  kSkinnyTiles[kTileIndex].blocks_per_sm)
    skinny_kernel(const __grid_constant__ SkinnyArgs args) {
  SkinnyKernel<kSkinnyTiles[kTileIndex], T>::run(args);
}

template <int kTileIndex>
void launch_tile(const SkinnyArgs& args, bool x_given, DType x_dtype, const LaunchShape& shape,
                 const ExecContext& ctx) {
  if (!x_given) {
    launch<skinny_kernel<kTileIndex, int8_t>>("matmul of few rows", shape, ctx, args);
  } else if (x_dtype == DType::kFloat16) {
    launch<skinny_kernel<kTileIndex, __half>>("linear of few rows", shape, ctx, args);
  } else if (x_dtype == DType::kBFloat16) {
    launch<skinny_kernel<kTileIndex, __nv_bfloat16>>("linear of few rows", shape, ctx, args);
  } else {
    launch<skinny_kernel<kTileIndex, float>>("linear of few rows", shape, ctx, args);
  }
}

}  // namespace int8_ops::cuda::skinny
