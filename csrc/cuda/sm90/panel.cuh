// The Hopper kernel for few rows and short K: one launch, in which every block does one thing after
// the other, once.
//
//   w: global --copy engine, a share to all blocks of a cluster--> shared --> registers --+
//                                                                                         wgmma
//   x: global --> quantize --> shared ----------------------------------------------------+
//
// The sums are scaled and stored from where wgmma leaves them.
//
// Note [Short kernels]
// At such sizes a kernel takes some 5,000 cycles, of which its launch and the way of the first
// bytes are most. What is left to win:
//   - Little crosses from L2 to the multiprocessors. A cluster's blocks have the same columns and
//     other rows: x is read and quantized by few, and of w each block fetches a share for all.
//   - The next kernel's launch. Its blocks find room beside this one's, and are let in as soon as
//     the rows are here: every block of this grid has begun then.
//   - Little code, since each instruction runs once and comes from cold memory. The sums of a block
//     stay where wgmma leaves them: with mma.sync the warps shared K, and what they summed met in
//     shared memory, which took longer than the products.
// The product is the transposed one, as in stationary.cuh.
#pragma once

#include <type_traits>

#include "../epilogue/column_factors.cuh"
#include "../heuristics/panel_tiles.h"
#include "../launch.cuh"
#include "../ptx/cluster.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/ldmatrix.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/tma.cuh"
#include "../ptx/wgmma_s8.cuh"
#include "row_round.cuh"

namespace int8_ops::cuda::sm90 {

struct PanelArgs {
  const void* x;  // [m, k], of the kernel's T; int8: quantized already
  const int8_t* w;
  int32_t k;
  ScaleEpilogue epilogue;
};

template <PanelTile kTile>
struct alignas(1024) PanelShared {
  static constexpr int kBlockK = 128;  // the bytes that a swizzled row has

  uint8_t rows[PanelTile::kMaxK / kBlockK][kTile.rows][kBlockK];  // of each eight, swizzled
  alignas(128) uint8_t w[kTile.cols][PanelTile::kWeightStride];
  alignas(16) float a_scale[kTile.rows];
  alignas(8) uint64_t w_full;

  // Where eight bytes of a row lie; those half of K further are kHalfOfK from there.
  __device__ __forceinline__ uint8_t* place(int32_t row, int32_t eighth) {
    return &rows[eighth / 16][row][((eighth % 16 / 2) ^ (row % 8)) * 16 + eighth % 2 * 8];
  }
  static constexpr int kHalfOfK = 2 * kTile.rows * kBlockK;
};

// A warp's rows of x, from global memory to shared.
template <PanelTile kTile, typename T>
class PanelRows {
 public:
  static constexpr int kRows = kTile.rows / (PanelTile::kThreads / 32);

  __device__ __forceinline__ void load(const PanelArgs& args, int32_t m_first) {
    round_.template load<true>(static_cast<const T*>(args.x), m_first + first_row(),
                               args.epilogue.m, args.k, args.k);
  }
  // `arrived` is called when the rows are here.
  template <typename Arrived>
  __device__ __forceinline__ void store(const PanelArgs& args, int32_t m_first,
                                        PanelShared<kTile>& shared, Arrived&& arrived) const {
    constexpr int kHalf = PanelShared<kTile>::kHalfOfK;
    const auto factors = round_.find_factors(
        [&](int32_t row, float scale) { shared.a_scale[first_row() + row] = scale; }, arrived);
    if constexpr (kOneProduct<T>) {
      uint32_t rare = 0;
#pragma unroll
      for (int p = 0; p < kRows; ++p) {
        uint8_t* const to = shared.place(first_row() + p, Round::lane());
        uint32_t doubt = 0;
#pragma unroll
        for (int i = 0; i < Round::kChunkCount; ++i) {
          const uint2 q = quantize_chunk(round_.chunks[p][i], factors.inverse[p], doubt);
          *reinterpret_cast<uint2*>(to + i * kHalf) = q;
        }
        rare |= doubt << p;
      }
      if (__builtin_expect(rare != 0, 0)) store_rare(args, m_first, shared, rare);
    } else {
      round_.quantize(factors, PanelTile::kMaxK, kHalf, [&](int32_t row) {
        return reinterpret_cast<int8_t*>(shared.place(first_row() + row, Round::lane()));
      });
    }
  }

 private:
  using Round = RowRound<T, 32, PanelTile::kMaxK / (32 * kChunk), kRows, true>;
  static __device__ __forceinline__ int32_t first_row() {
    return static_cast<int32_t>(threadIdx.x / 32) * kRows;
  }

  // Rows that are not finite, which become zeros, and those of float16 that are divided: read
  // again, for little code.
  static __device__ __forceinline__ void store_rare(const PanelArgs& args, int32_t m_first,
                                                    PanelShared<kTile>& shared, uint32_t rare) {
    __syncwarp();  // the scales are written
#pragma unroll 1
    for (; rare != 0; rare &= rare - 1) {
      const int32_t row = first_row() + __ffs(static_cast<int>(rare)) - 1;
      const float divisor = shared.a_scale[row];
      const T* const x =
          static_cast<const T*>(args.x) + static_cast<int64_t>(m_first + row) * args.k;
#pragma unroll 1
      for (int32_t chunk = Round::lane(); chunk * kChunk < args.k; chunk += 32) {
        uint2 q = make_uint2(0, 0);
        if constexpr (std::is_same_v<T, __half>) {
          Chunk<T> values;
          values.load_cached(x + chunk * kChunk);
          q = quantize_chunk_by_division(values, {divisor, divisor, -1.0F});
        }
        *reinterpret_cast<uint2*>(shared.place(row, chunk)) = q;
      }
    }
  }

  Round round_;
};

// Rows that are quantized already: a lane has sixteen bytes of each.
template <PanelTile kTile>
class PanelRows<kTile, int8_t> {
 public:
  static constexpr int kRows = kTile.rows / (PanelTile::kThreads / 32);

  __device__ __forceinline__ void load(const PanelArgs& args, int32_t m_first) {
    const int32_t first = m_first + first_row();
#pragma unroll
    for (int p = 0; p < kRows; ++p) {
      const bool there = first + p < args.epilogue.m && lane() * 16 < args.k;
      const auto* const from =
          static_cast<const int8_t*>(args.x) + static_cast<int64_t>(first + p) * args.k;
      sixteen_[p] = make_uint4(0, 0, 0, 0);
      if (there) sixteen_[p] = *reinterpret_cast<const uint4*>(from + lane() * 16);
    }
    const int32_t row = first + lane();
    const bool scaled = lane() < kRows && row < args.epilogue.m && args.epilogue.a_scale != nullptr;
    scale_ = scaled ? args.epilogue.a_scale[row] : 0.0F;
  }
  template <typename Arrived>
  __device__ __forceinline__ void store(const PanelArgs& /*args*/, int32_t /*m_first*/,
                                        PanelShared<kTile>& shared, Arrived&& arrived) const {
#pragma unroll
    for (int p = 0; p < kRows; ++p) {
      *reinterpret_cast<uint4*>(shared.place(first_row() + p, lane() * 2)) = sixteen_[p];
    }
    if (lane() < kRows) shared.a_scale[first_row() + lane()] = scale_;
    arrived();
  }

 private:
  static __device__ __forceinline__ int32_t lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int32_t first_row() {
    return static_cast<int32_t>(threadIdx.x / 32) * kRows;
  }
  uint4 sixteen_[kRows];
  float scale_;
};

// T: dtype of x; int8: a is given, with its scales.
template <PanelTile kTile, typename T>
struct PanelKernel {
  using Shared = PanelShared<kTile>;
  static constexpr int kWarps = PanelTile::kThreads / 32;
  static constexpr int kSteps = PanelTile::kMaxK / 32;
  static constexpr int kWarpCols = 16;
  static constexpr int kStoringWarps = kTile.cols / kWarpCols;
  // Whole warpgroups: where columns are few, the others multiply the same ones again.
  static constexpr int kMultiplyingWarps = kStoringWarps < 4 ? 4 : kStoringWarps;
  static constexpr int kShare = kTile.cols / kTile.cluster;  // of w, that a block fetches

  static_assert(sizeof(Shared) == static_cast<size_t>(kTile.shared_bytes()),
                "the host asks for what is used");
  static_assert(kTile.rows % kWarps == 0 && kShare % kWarps == 0 && kMultiplyingWarps <= kWarps,
                "the warps share rows, and what there is to fetch of w, evenly");

  using Sums = int32_t[kTile.rows / 2];
  using Weights = uint32_t[kSteps][4];  // a k32 step has four registers: see wgmma_s8()

  // A warp's part of this block's share, a column a copy, to all blocks. Columns that are not there
  // repeat the last one; their sums are not stored. Of each sixteen the even columns come first, so
  // that what a thread gets of wgmma are neighbours.
  static __device__ __forceinline__ void fetch_weights(const PanelArgs& args, Shared& shared,
                                                       int32_t rank, int32_t n_first) {
    const uint32_t full = ptx::shared_address(&shared.w_full);
    const int32_t last = args.epilogue.n - 1;
    int32_t col = rank * kShare + static_cast<int32_t>(threadIdx.x / 32);
#pragma unroll 1
    for (int i = 0; i < kShare / kWarps; ++i, col += kWarps) {
      const int32_t slot = col / 16 * 16 + col % 2 * 8 + col % 16 / 2;
      const int8_t* const from = args.w + static_cast<int64_t>(min(n_first + col, last)) * args.k;
      if (threadIdx.x % 32 != 0) continue;
      const uint32_t to = ptx::shared_address(shared.w[slot]);
      if constexpr (kTile.cluster > 1) {
        constexpr uint16_t kEveryone = (1U << kTile.cluster) - 1;
        ptx::bulk_load_multicast(to, from, args.k, full, kEveryone);
      } else {
        ptx::bulk_load(to, from, args.k, full);
      }
    }
  }

  // What lies beyond K is multiplied by zeros.
  static __device__ __forceinline__ void take_weights(Weights& w, const Shared& shared) {
    const int lane = threadIdx.x % 32;
    const int slot = threadIdx.x / 32 * kWarpCols % kTile.cols + lane % 16;
    const uint32_t from = ptx::shared_address(&shared.w[slot][lane / 16 * 16]);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) ptx::ldmatrix_x4(w[step], from + step * 32);
  }

  static __device__ __forceinline__ void multiply(Sums& sums, const Weights& w,
                                                  const Shared& shared) {
    const uint64_t rows = ptx::wgmma_descriptor(ptx::shared_address(shared.rows));
    constexpr int kBlockSteps = Shared::kBlockK / 32;
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int offset =
          step / kBlockSteps * kTile.rows * Shared::kBlockK + step % kBlockSteps * 32;
      ptx::wgmma_s8(sums, w[step], rows + offset / 16, step != 0);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_touch(sums);
  }

  // sums[4 j + 2 h + e]: row 8 j + 2 (lane % 4) + e, column 2 (lane / 4) + h of the warp's sixteen.
  // store(row beyond this thread's first, one value, its neighbour's) is called for every row.
  template <typename Store>
  static __device__ __forceinline__ void each_pair(const Sums& sums, Store&& store) {
#pragma unroll
    for (int i = 0; i < kTile.rows / 4; ++i) {
      const int sum = i / 2 * 4 + i % 2;
      store(i / 2 * 8 + i % 2, sums[sum], sums[sum + 2]);
    }
  }

  static __device__ __forceinline__ void store(const ScaleEpilogue& e, const Sums& sums,
                                               const Shared& shared,
                                               const ColumnFactors (&columns)[2], int32_t m_first,
                                               int32_t col) {
    const int32_t first = static_cast<int32_t>(threadIdx.x % 4) * 2;
    const int32_t rows = col < e.n ? e.m - m_first - first : 0;
    const int64_t at = static_cast<int64_t>(m_first + first) * e.n + col;
    if (e.out_dtype == DType::kInt32) {
      auto* const to = static_cast<int32_t*>(e.out) + at;
      each_pair(sums, [&](int row, int32_t one, int32_t other) {
        if (row >= rows) return;
        to[static_cast<int64_t>(row) * e.n] = one;
        if (col + 1 < e.n) to[static_cast<int64_t>(row) * e.n + 1] = other;
      });
      return;
    }
    const float w_scale[2] = {columns[0].w_scale(), columns[1].w_scale()};
    // Without a bias -0 is added, which changes nothing, not even a -0.
    const bool biased = e.bias != nullptr;
    const float bias[2] = {biased ? columns[0].bias(e) : -0.0F,
                           biased ? columns[1].bias(e) : -0.0F};
    const auto each_result = [&](auto&& put) {
      each_pair(sums, [&](int row, int32_t one, int32_t other) {
        const float row_scale = shared.a_scale[first + row];
        put(row, __fadd_rn(ScaleEpilogue::scaled(one, row_scale, w_scale[0]), bias[0]),
            __fadd_rn(ScaleEpilogue::scaled(other, row_scale, w_scale[1]), bias[1]));
      });
    };
    if (e.vector && e.out_dtype != DType::kFloat32) {
      auto* const to = static_cast<uint16_t*>(e.out) + at;
      const bool half = e.out_dtype == DType::kFloat16;
      each_result([&](int row, float one, float other) {
        const uint32_t pair = half ? pack_16bit(DType::kFloat16, one, other)
                                   : pack_16bit(DType::kBFloat16, one, other);
        if (row < rows) {
          *reinterpret_cast<uint32_t*>(to + static_cast<int64_t>(row) * e.n) = pair;
        }
      });
    } else {
      each_result([&](int row, float one, float other) {
        if (row >= rows) return;
        const int64_t place = at + static_cast<int64_t>(row) * e.n;
        store_float(e.out, e.out_dtype, place, one);
        if (col + 1 < e.n) store_float(e.out, e.out_dtype, place + 1, other);
      });
    }
  }

  static __device__ __forceinline__ void run(const PanelArgs& args) {
    extern __shared__ __align__(1024) uint8_t storage[];
    Shared& shared = *reinterpret_cast<Shared*>(storage);
    const uint32_t full = ptx::shared_address(&shared.w_full);
    if (threadIdx.x == 0) {
      if (ptx::shared_address(storage) % 1024 != 0) __trap();
      ptx::mbarrier_init(full, 1);
      ptx::mbarrier_arrive_expect_tx(full, static_cast<uint32_t>(kTile.cols * args.k));
      ptx::fence_mbarrier_init();
    }
    if constexpr (kTile.cluster > 1) {
      ptx::cluster_arrive_relaxed();
      ptx::cluster_wait();
    } else {
      __syncthreads();
    }
    ptx::grid_dependency_wait();

    const auto rank = static_cast<int32_t>(blockIdx.x % kTile.cluster);
    const auto row_block = static_cast<int32_t>(blockIdx.y) * kTile.cluster + rank;
    const int32_t m_first = row_block * kTile.rows;
    const int32_t n_first = static_cast<int32_t>(blockIdx.x / kTile.cluster) * kTile.cols;
    // x first: its way is the longer one.
    PanelRows<kTile, T> rows;
    rows.load(args, m_first);
    fetch_weights(args, shared, rank, n_first);
    const auto warp = static_cast<int>(threadIdx.x / 32);
    const int32_t col = n_first + warp * kWarpCols + static_cast<int32_t>(threadIdx.x % 32 / 4) * 2;
    ColumnFactors columns[2];
    if (warp < kStoringWarps) {
      columns[0].load(args.epilogue, col);
      columns[1].load(args.epilogue, col + 1);
    }
    rows.store(args, m_first, shared, [] { ptx::grid_dependency_trigger(); });
    ptx::fence_proxy_async();

    Weights w;
    if (warp < kMultiplyingWarps) {
      ptx::mbarrier_wait_parity(full, 0);
      take_weights(w, shared);
    }
    __syncthreads();
    // All that is sent to this block has come, and what it sent the others they wait for: a cluster
    // need not leave together.
    if (warp >= kMultiplyingWarps) return;
    Sums sums;
    multiply(sums, w, shared);
    if (warp < kStoringWarps) store(args.epilogue, sums, shared, columns, m_first, col);
  }
};

// By index: nvcc's host stubs cannot spell a template argument of class type.
template <int kTileIndex, typename T>
__global__ void __launch_bounds__(PanelTile::kThreads, PanelTile::kBlocksPerSm)
    panel_kernel(const __grid_constant__ PanelArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PanelKernel<kPanelTiles[kTileIndex], T>::run(args);
#endif
}

template <int kTileIndex>
void launch_panel(const PanelArgs& args, bool x_given, DType x_dtype, const LaunchShape& shape,
                  const ExecContext& ctx) {
  if (!x_given) {
    launch<panel_kernel<kTileIndex, int8_t>>("sm90 matmul of few rows", shape, ctx, args);
  } else if (x_dtype == DType::kFloat16) {
    launch<panel_kernel<kTileIndex, __half>>("sm90 linear of few rows", shape, ctx, args);
  } else if (x_dtype == DType::kBFloat16) {
    launch<panel_kernel<kTileIndex, __nv_bfloat16>>("sm90 linear of few rows", shape, ctx, args);
  } else {
    launch<panel_kernel<kTileIndex, float>>("sm90 linear of few rows", shape, ctx, args);
  }
}

}  // namespace int8_ops::cuda::sm90
