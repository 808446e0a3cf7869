// The Hopper kernel for K up to 1024: w stays in registers, rows of a pass by.
//
//   w --copy engine, once--> buffers --> registers \
//                                                   > --wgmma--> sums --epilogue--> global
//   x --quantize--> a share of a tile of rows --copy engine--> the tile's buffers
//   or a --copy engine, a share to all blocks of the cluster-> the tile's buffers
//
// The blocks of a cluster hold neighbouring columns and multiply the same tiles of rows
// (stationary_rows.cuh), so that L2 delivers neither x nor w a second time.
//
// w is wgmma's first operand, which may come from registers: 128 of a thread hold 64 columns of
// K = 1024, 128 of K = 512, and so on. Shared memory is left to the rows, of which a product then
// reads 64 bytes a cycle; the sums are those of the transposed tile, and stmatrix turns them again.
//
// A block has two warpgroups that multiply in turn: while one multiplies, the other scales and
// stores. A third quantizes, or its first threads drive the copy engine.
#pragma once

#include "../heuristics/sm90_tiles.h"
#include "../launch.cuh"
#include "../ptx/cluster.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/ldmatrix.cuh"
#include "../ptx/opaque.cuh"
#include "../ptx/tma.cuh"
#include "../ptx/wgmma_s8.cuh"
#include "gemm_args.cuh"
#include "stationary_rows.cuh"
#include "transposed_epilogue.cuh"

namespace int8_ops::cuda::sm90 {

// kKBlocks: of K, rounded up to what StationaryTile::held_k_blocks() gives.
template <Source kSource, DType kOut, int kKBlocks>
struct StationaryKernel {
  static_assert(kSource != Source::kFloat32, "such rows do not fit the quantizing threads");
  static constexpr bool kQuantizes = kSource != Source::kInt8;
  static constexpr bool kThroughL2 = kQuantizes && StationaryTile::through_l2(kKBlocks);
  static constexpr int kTileRows = StationaryTile::kBlockM;
  static constexpr int kUnitColumns = StationaryTile::kUnitColumns;
  static constexpr int kColumns = kUnitColumns / 2;  // of a warpgroup's product
  static constexpr int kRowBytes = StationaryTile::kBlockK;
  static constexpr int kUnits = StationaryTile::max_units(kKBlocks * kRowBytes);
  static constexpr int kWarpgroup = 128;
  static constexpr int kBoxBytes = kColumns * kRowBytes;  // of w
  static constexpr int kStagedBytes = TransposedEpilogue<kOut>::kStagedBytes;
  // Threads that write to a tile's buffer or scales, beside the copy engine.
  static constexpr uint32_t kWriters = kThroughL2 ? 0 : kQuantizes ? kWarpgroup : 32;
  // Of 168 a thread at entry.
  static constexpr uint32_t kFillerRegisters = kQuantizes ? 120 : 40;
  static constexpr uint32_t kConsumerRegisters = kQuantizes ? 192 : 232;

  static constexpr uint32_t kTurnBarrier = 1;  // and the next, one a warpgroup
  static constexpr uint32_t kColumnsBarrier = 3;

  struct Head {
    StageBarriers<StationaryTile::kMaxRowBuffers> rows;
    alignas(8) uint64_t weights;
    alignas(8) uint64_t room;
  };
  static_assert(sizeof(Head) <= StationaryTile::kHeadBytes);

  using Sums = typename TransposedEpilogue<kOut>::Sums;

  const GemmArgs& args;
  StationaryRows rows;
  uint32_t weights;       // [units][2][k_blocks][64][128]: in the buffers of the rows, at first
  uint32_t weights_full;  // a barrier
  uint32_t staging;       // [2][kStagedBoxes][64][128]
  TransposedEpilogue<kOut> epilogue;
  int32_t units;  // of this block, that begin within n

  // ---- w: by the copy engine to shared memory, and from there to registers
  // ---------------------------------------------------

  // By one thread.
  __device__ __forceinline__ void load_weights() const {
    if (units == 0) return;
    const int32_t boxes = units * 2 * args.k_blocks;
    ptx::mbarrier_arrive_expect_tx(weights_full, boxes * kBoxBytes);
    for (int32_t i = 0; i < units * 2; ++i) {
      for (int32_t b = 0; b < args.k_blocks; ++b) {
        ptx::tma_load_2d(weights + (i * args.k_blocks + b) * kBoxBytes, &args.w_map, weights_full,
                         b * kRowBytes, epilogue.n_first + i * kColumns);
      }
    }
  }

  // Every k32 step of a unit has four registers: see wgmma_s8().
  struct Weights {
    uint32_t held[kUnits][kKBlocks][4][4];
  };

  __device__ __forceinline__ void take_weights(Weights& w, int warpgroup) const {
    const int lane = threadIdx.x % 32;
    // Matrix lane / 8 of an ldmatrix: rows 8 (lane / 8 % 2) .., chunk of sixteen bytes lane / 16.
    const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane / 8 % 2 * 8 + lane % 8;
    if (units > 0) ptx::mbarrier_wait_parity(weights_full, 0);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int b = 0; b < kKBlocks; ++b) {
        const bool there = u < units && b < args.k_blocks;
        const uint32_t box =
            weights + ((u * 2 + warpgroup) * args.k_blocks + b) * kBoxBytes + row * kRowBytes;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          uint32_t (&four)[4] = w.held[u][b][step];
          if (there) {
            ptx::ldmatrix_x4(four, box + (((step * 2 + lane / 16) ^ (row % 8)) * 16));
          } else {
            four[0] = four[1] = four[2] = four[3] = 0;
          }
        }
      }
    }
    if constexpr (kThroughL2) {
      // Every thread at every block's barrier, once a launch. A lane for its warp would do, as in
      // tell(), but racecheck takes a multicast out of L2 to wait for the reads of those alone that
      // arrive where it is sent.
      for (uint32_t block = 0; block < rows.cluster; ++block) {
        ptx::mbarrier_arrive_cluster(rows.room, block);
      }
    } else {
      __syncwarp();
      tell(rows.room);
    }
  }

  // ---- two warpgroups: multiply, scale, store
  // ----------------------------------------------------

  // Scales and bias of the block's columns, by all threads of both. Without a bias -0 is added,
  // which changes nothing, not even a -0.
  __device__ __forceinline__ void load_columns() const {
    const ScaleEpilogue& e = args.epilogue;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < units * kUnitColumns;
         i += 2 * kWarpgroup) {
      const int32_t col = epilogue.n_first + i;
      const bool in = col < e.n && kOut != DType::kInt32;
      epilogue.w_scales[i] = in ? e.w_scale[col] : 0.0F;
      epilogue.bias[i] = in && e.bias != nullptr ? load_float(e.bias, e.bias_dtype, col) : -0.0F;
    }
    ptx::named_barrier_sync(kColumnsBarrier, 2 * kWarpgroup);
  }

  // The first product is warpgroup 0's.
  __device__ __forceinline__ void take_turn(int warpgroup, bool first) const {
    if (warpgroup == 0 && first) return;
    ptx::named_barrier_sync(kTurnBarrier + warpgroup, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void give_turn(int warpgroup, bool last) const {
    if (warpgroup == 1 && last) return;
    ptx::named_barrier_arrive(kTurnBarrier + (warpgroup ^ 1), 2 * kWarpgroup);
  }

  // An arrival of every warp at a barrier of every block, and of every thread at this block's.
  static constexpr uint32_t kOwnArrivals = 2 * kWarpgroup;
  static constexpr uint32_t kOtherArrivals = 2 * kWarpgroup / 32;
  __device__ __forceinline__ void tell(uint32_t barrier) const {
    ptx::mbarrier_arrive(barrier);
    const uint32_t block = threadIdx.x % 32;
    if (block < rows.cluster && block != rows.rank) ptx::mbarrier_arrive_cluster(barrier, block);
  }

  // Starts a unit's product with a tile of rows; all but its last K-block is over after. K-blocks
  // beyond K multiply whatever lies after the buffer with a w of zeros: a branch here would make
  // the compiler wait for every product.
  static __device__ __forceinline__ void multiply(Sums& sums, const uint32_t (&w)[kKBlocks][4][4],
                                                  uint64_t tile, uint32_t k_step) {
    ptx::wgmma_fence();
#pragma unroll
    for (int b = 0; b < kKBlocks; ++b) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        ptx::wgmma_s8(sums, w[b][step], tile + b * k_step + step * 2, b + step != 0);
      }
      ptx::wgmma_commit_group();
    }
    if constexpr (kKBlocks > 1) ptx::wgmma_wait_group<1>();
  }

  __device__ __forceinline__ void consume(int warpgroup) const {
    Weights w;
    take_weights(w, warpgroup);
    load_columns();
    const int32_t tiles = rows.tiles();
    const uint64_t rows_at = ptx::wgmma_descriptor(ptx::shared_address(rows.buffers),
                                                   kQuantizes ? rows.group_bytes() : 8 * kRowBytes);
    const uint32_t k_step = (kQuantizes ? 8 * kRowBytes : StationaryRows::kBoxBytes) >> 4;
    const uint32_t my_staging = staging + warpgroup * (StationaryTile::kStagedBoxes * kStagedBytes);
    RingPlace at;
    uint32_t box = 0;
#pragma unroll 1
    for (int32_t i = 0; i < tiles; ++i) {
      rows.ring.wait_full(at);
      if (i + 1 == tiles) ptx::grid_dependency_trigger();
      const uint64_t tile = rows_at + at.stage * (rows.buffer_bytes() >> 4);
      if (units == 0) tell(rows.ring.empty_at(at));
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (u >= units) break;
        Sums sums;
        take_turn(warpgroup, i == 0 && u == 0);
        multiply(sums, w.held[u], tile, k_step);
        give_turn(warpgroup, i + 1 == tiles && u + 1 == units);
        ptx::wgmma_wait_group<0>();
        ptx::wgmma_touch(sums);
        if (u + 1 == units) tell(rows.ring.empty_at(at));
        // Addresses of every unit's columns would take more registers than are left.
        int32_t first = u * kUnitColumns + warpgroup * kColumns;
        ptx::make_opaque(first);
        epilogue.store(sums, rows.scales_of(at), (rows.first_tile + i * rows.tile_step) * kTileRows,
                       first, warpgroup, my_staging + box * kStagedBytes);
        box ^= 1;
      }
      at.next(args.stages);
    }
  }

  static __device__ __forceinline__ void run(const GemmArgs& args) {
    extern __shared__ __align__(1024) uint8_t storage[];
    if (threadIdx.x == 0 && ptx::shared_address(storage) % 1024 != 0) __trap();
    StationaryKernel kernel{args, {args}, 0, 0, 0, {args}, 0};
    StationaryRows& rows = kernel.rows;
    rows.cluster = ptx::cluster_blocks();
    rows.rank = ptx::cluster_block_rank();
    const auto cluster_index = static_cast<int32_t>(blockIdx.x / rows.cluster);
    const auto clusters = static_cast<int32_t>(gridDim.x / rows.cluster);
    const int32_t columns = args.n_tiles * kUnitColumns;
    kernel.epilogue.n_first = (cluster_index % args.n_parts * static_cast<int32_t>(rows.cluster) +
                               static_cast<int32_t>(rows.rank)) *
                              columns;
    kernel.units = min(
        args.n_tiles, max(0, (args.n - kernel.epilogue.n_first + kUnitColumns - 1) / kUnitColumns));
    rows.first_tile = cluster_index / args.n_parts;
    rows.tile_step = clusters / args.n_parts;

    // What is swizzled comes first, at multiples of 1024.
    uint8_t* at = storage;
    const auto take = [&](uint32_t bytes) {
      uint8_t* const taken = at;
      at += bytes;
      return taken;
    };
    rows.buffers = take(args.stages * rows.buffer_bytes());
    kernel.staging = ptx::shared_address(take(2 * StationaryTile::kStagedBoxes * kStagedBytes));
    // The last buffers wait while w lies there.
    rows.first_late = StationaryTile::early_buffers(args.n_tiles, args.stages);
    kernel.weights = ptx::shared_address(rows.buffers) + rows.first_late * rows.buffer_bytes();
    kernel.epilogue.w_scales = reinterpret_cast<float*>(take(columns * 4));
    kernel.epilogue.bias = reinterpret_cast<float*>(take(columns * 4));
    rows.scales = reinterpret_cast<float*>(take(2 * args.stages * kTileRows * 4));
    auto* const head = reinterpret_cast<Head*>(at);
    kernel.weights_full = ptx::shared_address(&head->weights);
    rows.room = ptx::shared_address(&head->room);
    rows.ring = {ptx::shared_address(head->rows.full), ptx::shared_address(head->rows.empty)};

    if (threadIdx.x == 0) {
      ptx::prefetch_tensormap(&args.w_map);
      if constexpr (!kQuantizes) ptx::prefetch_tensormap(&args.a_map);
      const uint32_t arrivals = kOwnArrivals + kOtherArrivals * (rows.cluster - 1);
      for (int s = 0; s < args.stages; ++s) {
        // Who announces the bytes, and who writes beside the copy engine.
        ptx::mbarrier_init(rows.ring.full + s * 8, 1 + kWriters);
        ptx::mbarrier_init(rows.ring.empty + s * 8, arrivals);
      }
      ptx::mbarrier_init(rows.room, kThroughL2 ? kOwnArrivals * rows.cluster : arrivals);
      ptx::mbarrier_init(kernel.weights_full, 1);
      ptx::fence_mbarrier_init();
    }
    if (rows.cluster > 1) {
      ptx::cluster_sync();
    } else {
      __syncthreads();
    }
    ptx::grid_dependency_wait();

    const int warpgroup = threadIdx.x / kWarpgroup;
    if (warpgroup == 2) {
      ptx::set_max_registers_dec<kFillerRegisters>();
      if (threadIdx.x == 2 * kWarpgroup) kernel.load_weights();
      const int warp = threadIdx.x / 32 % 4;
      if constexpr (kSource == Source::kInt8) {
        if (threadIdx.x == 2 * kWarpgroup) rows.load();
        if (warp == 1) rows.load_scales();
      }
      if constexpr (kSource == Source::kFloat16) rows.template quantize<__half, kKBlocks>(warp);
      if constexpr (kSource == Source::kBFloat16) {
        rows.template quantize<__nv_bfloat16, kKBlocks>(warp);
      }
    } else {
      ptx::set_max_registers_inc<kConsumerRegisters>();
      kernel.consume(warpgroup);
      // The block's shared memory must outlive its stores.
      if (threadIdx.x % kWarpgroup == 0) ptx::bulk_wait_group_read<0>();
    }
    // And what its neighbours send to it.
    __syncwarp();
    if (rows.cluster > 1) ptx::cluster_sync();
  }
};

template <Source kSource, DType kOut, int kKBlocks>
__global__ void __launch_bounds__(StationaryTile::kThreads, 1)
    stationary_kernel(const __grid_constant__ GemmArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  StationaryKernel<kSource, kOut, kKBlocks>::run(args);
#endif
}

}  // namespace int8_ops::cuda::sm90
