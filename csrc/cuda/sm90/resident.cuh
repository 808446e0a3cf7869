// The Hopper kernel for short K: 128 rows of a stay in shared memory, w passes by.
//
//   x --load, quantize, store--> rows of a \
//   or a --copy engine---------> rows of a  > --wgmma--> sums --epilogue--> global
//   w --copy engine--> stages of the ring  /
//
// A block has one warpgroup whose first thread drives the copy engine, and two that each own 64
// rows: they quantize them, multiply, and store. (Clusters that share what they load of w were
// tried: the waiting for each other cost more than L2 gained.)
#pragma once

#include "../heuristics/sm90_tiles.h"
#include "../launch.cuh"
#include "../ptx/cluster.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/tma.cuh"
#include "consumer.cuh"
#include "gemm_args.cuh"
#include "ring.cuh"
#include "row_quantizer.cuh"
#include "warpgroup_tile.cuh"

namespace int8_ops::cuda::sm90 {

template <ResidentTile kTile, Source kSource, DType kOut>
struct ResidentKernel {
  static constexpr int kBlockM = ResidentTile::kBlockM;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kWarpgroups = kBlockM / kWarpgroupM;  // that multiply
  static constexpr int kRowsBlockBytes = kBlockM * kBlockK;  // a K-block of the rows
  static constexpr bool kQuantizes = kSource != Source::kInt8;
  static constexpr uint32_t kReaders = kWarpgroups * 4;  // warps that free a stage
  // Of 168 a thread at entry: what the producer gives up, the others take.
  static constexpr uint32_t kProducerRegisters = 40;
  static constexpr uint32_t kConsumerRegisters = 232;

  using Tile = WarpgroupTile<kBlockN, kTile.staged_cols>;

  struct Head {
    float scales[kBlockM];
    StageBarriers<kSm90MaxStages> ring;
    StageBarriers<2> rows;
    SlotBarriers<kSm90MaxFactorSlots> slots;
  };
  static_assert(sizeof(Head) <= ResidentTile::kHeadBytes, "scales and barriers fit the head");
  static_assert(sizeof(typename Tile::Factors) == kTile.slot_bytes());
  static_assert(kWarpgroups * Tile::kStagingBytes == kTile.staging_bytes());

  // One row tile of this block, and the column tiles to multiply it with.
  struct Work {
    int32_t row;
    int32_t n_begin;
    int32_t n_end;
  };

  const GemmArgs& args;
  Head* head = nullptr;
  uint8_t* rows;     // [buffers][k_blocks][128][128]
  uint8_t* stages;   // [stages][block_n][128]
  uint8_t* staging;  // a warpgroup each
  typename Tile::Factors* factors;
  RingBarriers ring;
  RingBarriers row_ring;
  RingBarriers slots;
  uint32_t row_buffers;

  __device__ __forceinline__ int32_t works() const { return args.m_tiles * args.n_parts; }
  __device__ __forceinline__ Work work_at(int32_t index) const {
    const int32_t part = index % args.n_parts;
    Work work;
    work.row = index / args.n_parts * kBlockM;
    work.n_begin = static_cast<int32_t>(static_cast<int64_t>(args.n_tiles) * part / args.n_parts);
    work.n_end =
        static_cast<int32_t>(static_cast<int64_t>(args.n_tiles) * (part + 1) / args.n_parts);
    return work;
  }
  __device__ __forceinline__ uint32_t rows_bytes() const {
    return static_cast<uint32_t>(args.k_blocks) * kRowsBlockBytes;
  }

  // ---- one thread: everything that the copy engine moves
  // -----------------------------------------

  __device__ __forceinline__ void load_rows(const RingPlace& at, int32_t row) const {
    row_ring.wait_empty(at);
    const uint32_t full = row_ring.full_at(at);
    ptx::mbarrier_arrive_expect_tx(full, rows_bytes());
    const uint32_t to = ptx::shared_address(rows) + at.stage * rows_bytes();
    for (int32_t b = 0; b < args.k_blocks; ++b) {
      ptx::tma_load_2d(to + b * kRowsBlockBytes, &args.a_map, full, b * kBlockK, row);
    }
  }

  // With the tile's last K-block come its factors, to `slot`.
  __device__ __forceinline__ void load_stage(const RingPlace& at, int32_t k_block, int32_t n_tile,
                                             const RingPlace& slot, bool last) const {
    ring.wait_empty(at);
    if (last) slots.wait_empty(slot);
    const uint32_t full = ring.full_at(at);
    const int32_t n_first = n_tile * kBlockN;
    const FactorLoader<false, kBlockN> loader(args, n_first, 0);
    ptx::mbarrier_arrive_expect_tx(full, kTile.stage_bytes() + (last ? loader.bytes() : 0));
    if (last) loader.load(factors[slot.stage], full);
    ptx::tma_load_2d(ptx::shared_address(stages) + at.stage * kTile.stage_bytes(), &args.w_map,
                     full, k_block * kBlockK, n_first);
  }

  __device__ __forceinline__ void produce() const {
    RingPlace at;
    RingPlace rows_at;
    RingPlace slot;
    for (int32_t index = static_cast<int32_t>(blockIdx.x); index < works();
         index += static_cast<int32_t>(gridDim.x)) {
      const Work work = work_at(index);
      if constexpr (!kQuantizes) {
        load_rows(rows_at, work.row);
        rows_at.next(row_buffers);
      } else if (index + static_cast<int32_t>(gridDim.x) < works()) {
        prefetch_rows(work_at(index + static_cast<int32_t>(gridDim.x)).row);
      }
      for (int32_t n_tile = work.n_begin; n_tile < work.n_end; ++n_tile) {
        for (int32_t b = 0; b < args.k_blocks; ++b) {
          load_stage(at, b, n_tile, slot, b + 1 == args.k_blocks);
          at.next(args.stages);
        }
        slot.next(args.factor_slots);
      }
    }
  }

  // The next rows of x come to L2 while these are multiplied.
  __device__ __forceinline__ void prefetch_rows(int32_t row) const {
    if (row >= args.m) return;
    const int32_t count = min(kBlockM, args.m - row);
    constexpr int kSize = kSource == Source::kFloat32 ? 4 : 2;
    const auto* from =
        static_cast<const uint8_t*>(args.x) + static_cast<int64_t>(row) * args.k * kSize;
    ptx::prefetch_l2_bulk(from, static_cast<uint32_t>(count) * args.k * kSize);
  }

  // ---- two warpgroups: quantize, multiply, store
  // -------------------------------------------------

  struct Operands {
    static constexpr bool kRowFactors = false;
    uint64_t rows;
    uint64_t stages;
    __device__ __forceinline__ uint64_t a(int32_t k_block, uint32_t) const {
      return rows + k_block * (kRowsBlockBytes >> 4);
    }
    __device__ __forceinline__ uint64_t w(uint32_t stage) const {
      return stages + stage * (kTile.stage_bytes() >> 4);
    }
  };

  template <typename T>
  __device__ __forceinline__ void quantize(int32_t row, int warpgroup, int warp) const {
    const int32_t local = warpgroup * kWarpgroupM + warp * 16;
    quantize_16_rows(static_cast<const T*>(args.x), row + local, args.m, args.k,
                     rows + local * kBlockK, kRowsBlockBytes, head->scales + local);
  }

  __device__ __forceinline__ void consume(int warpgroup) const {
    const int warp = threadIdx.x / 32 % 4;
    const int32_t wg_row = warpgroup * kWarpgroupM;
    const int32_t local_row = wg_row + Tile::row_of_thread();
    const uint32_t rows_address = ptx::shared_address(rows) + warpgroup * kWarpgroupM * kBlockK;
    Consumer<Tile, kOut, 1, 2, kTile.ahead, Operands> consumer{
        {0, ptx::wgmma_descriptor(ptx::shared_address(stages))},        args, factors,
        ptx::shared_address(staging) + warpgroup * Tile::kStagingBytes, ring, slots};
    RingPlace rows_at;
    for (int32_t index = static_cast<int32_t>(blockIdx.x); index < works();
         index += static_cast<int32_t>(gridDim.x)) {
      const Work work = work_at(index);
      float row_scale[2];
      if constexpr (kQuantizes) {
        if constexpr (kSource == Source::kFloat16) quantize<__half>(work.row, warpgroup, warp);
        if constexpr (kSource == Source::kBFloat16) {
          quantize<__nv_bfloat16>(work.row, warpgroup, warp);
        }
        if constexpr (kSource == Source::kFloat32) quantize<float>(work.row, warpgroup, warp);
        ptx::fence_proxy_async();
        ptx::named_barrier_sync(kWarpgroupBarrier + warpgroup, kWarpgroupThreads);
        for (int half = 0; half < 2; ++half) {
          row_scale[half] = head->scales[local_row + half * 8];
        }
      } else {
        for (int half = 0; half < 2; ++half) {
          const int32_t row = work.row + local_row + half * 8;
          row_scale[half] =
              args.epilogue.a_scale != nullptr && row < args.m ? args.epilogue.a_scale[row] : 0.0F;
        }
        row_ring.wait_full(rows_at);
      }
      consumer.operands.rows =
          ptx::wgmma_descriptor(rows_address) + rows_at.stage * (rows_bytes() >> 4);
      if (index + static_cast<int32_t>(gridDim.x) >= works()) ptx::grid_dependency_trigger();
      int32_t n_tile = work.n_begin;
      consumer.run([&](TilePlace& place) {
        if (n_tile == work.n_end) return false;
        place = {work.row + wg_row, n_tile++ * kBlockN, {row_scale[0], row_scale[1]}};
        return true;
      });
      if constexpr (kQuantizes) {
        // Every warp's products have read the rows, and its scales are in registers.
        ptx::named_barrier_sync(kWarpgroupBarrier + warpgroup, kWarpgroupThreads);
      } else {
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(row_ring.empty_at(rows_at));
        rows_at.next(row_buffers);
      }
    }
  }

  static __device__ __forceinline__ void run(const GemmArgs& args, uint32_t row_buffers) {
    extern __shared__ __align__(1024) uint8_t storage[];
    if (threadIdx.x == 0 && ptx::shared_address(storage) % 1024 != 0) __trap();
    // What is swizzled comes first, at multiples of 1024.
    ResidentKernel kernel{args};
    kernel.rows = storage;
    kernel.stages = kernel.rows + row_buffers * kernel.rows_bytes();
    kernel.staging = kernel.stages + args.stages * kTile.stage_bytes();
    kernel.factors =
        reinterpret_cast<typename Tile::Factors*>(kernel.staging + kTile.staging_bytes());
    auto* const head = reinterpret_cast<Head*>(kernel.factors + args.factor_slots);
    kernel.head = head;
    kernel.ring = {ptx::shared_address(head->ring.full), ptx::shared_address(head->ring.empty)};
    kernel.row_ring = {ptx::shared_address(head->rows.full), ptx::shared_address(head->rows.empty)};
    kernel.slots = {0, ptx::shared_address(head->slots.empty)};
    kernel.row_buffers = row_buffers;

    if (threadIdx.x == 0) {
      ptx::prefetch_tensormap(&args.w_map);
      if constexpr (!kQuantizes) ptx::prefetch_tensormap(&args.a_map);
      for (int s = 0; s < kSm90MaxStages; ++s) {
        ptx::mbarrier_init(kernel.ring.full + s * 8, 1);
        ptx::mbarrier_init(kernel.ring.empty + s * 8, kReaders);
      }
      for (int s = 0; s < 2; ++s) {
        ptx::mbarrier_init(kernel.row_ring.full + s * 8, 1);
        ptx::mbarrier_init(kernel.row_ring.empty + s * 8, kReaders);
      }
      for (int s = 0; s < kSm90MaxFactorSlots; ++s) {
        ptx::mbarrier_init(kernel.slots.empty + s * 8, kWarpgroups * kWarpgroupThreads);
      }
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
    ptx::grid_dependency_wait();

    const int warpgroup = threadIdx.x / kWarpgroupThreads;
    if (warpgroup == kWarpgroups) {
      ptx::set_max_registers_dec<kProducerRegisters>();
      if (threadIdx.x == kWarpgroups * kWarpgroupThreads) kernel.produce();
    } else {
      ptx::set_max_registers_inc<kConsumerRegisters>();
      kernel.consume(warpgroup);
    }
    // The block's shared memory must outlive its stores.
    if (threadIdx.x % kWarpgroupThreads == 0) ptx::bulk_wait_group_read<0>();
  }
};

template <int kTileIndex, Source kSource, DType kOut>
__global__ void __launch_bounds__(ResidentTile::kThreads, 1)
    resident_kernel(const __grid_constant__ GemmArgs args, uint32_t row_buffers) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  ResidentKernel<kResidentTiles[kTileIndex], kSource, kOut>::run(args, row_buffers);
#endif
}

}  // namespace int8_ops::cuda::sm90
