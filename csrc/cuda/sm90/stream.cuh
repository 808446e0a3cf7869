// The Hopper kernel for any K: both operands stream through a ring of stages.
//
//   a, w --copy engine--> stages of the ring --wgmma--> sums --epilogue--> global
//
// A block has one warpgroup whose first thread drives the copy engine, and two that each multiply
// 64 of the tile's 128 rows. In a cluster, blocks of one row of tiles share what they load of a,
// blocks of one column of tiles what they load of w: each loads a share for all of them.
#pragma once

#include "../heuristics/sm90_tiles.h"
#include "../launch.cuh"
#include "../ptx/cluster.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/tma.cuh"
#include "background_quantizer.cuh"
#include "consumer.cuh"
#include "gemm_args.cuh"
#include "ring.cuh"
#include "warpgroup_tile.cuh"

namespace int8_ops::cuda::sm90 {

template <StreamTile kTile, Source kSource, DType kOut>
struct StreamKernel {
  static constexpr bool kQuantizes = kSource != Source::kInt8;
  static constexpr int kBlockM = StreamTile::kBlockM;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kClusterM = kTile.cluster_m;
  static constexpr int kClusterN = kTile.cluster_n;
  static constexpr int kCluster = kClusterM * kClusterN;
  static constexpr int kWarpgroups = kBlockM / kWarpgroupM;
  static constexpr int kABytes = kBlockM * kBlockK;
  static constexpr uint32_t kReaders = kWarpgroups * 4;
  // Of 168 a thread at entry: what the others give up, those that multiply take. (A fourth
  // warpgroup would leave 128 at entry, and ptxas then refuses wgmma's 128 sums.)
  static constexpr uint32_t kProducerRegisters = 120;
  static constexpr uint32_t kConsumerRegisters = 192;
  static constexpr int kSets = kBlockN <= 128 ? 2 : 1;

  using Tile = WarpgroupTile<kBlockN, kTile.staged_cols()>;
  struct Head {
    StageBarriers<kSm90MaxStages> ring;
    SlotBarriers<kSm90MaxFactorSlots> slots;
  };
  static_assert(sizeof(Head) <= StreamTile::kHeadBytes);
  static_assert(sizeof(typename Tile::Factors) == kTile.slot_bytes());
  static_assert(kWarpgroups * Tile::kStagingBytes == kTile.staging_bytes());

  const GemmArgs& args;
  uint8_t* stages;   // [stages][a: 128 rows, w: block_n rows][128]
  uint8_t* staging;  // a warpgroup each
  typename Tile::Factors* factors;
  RingBarriers ring;
  RingBarriers slots;
  uint32_t m_rank;  // of this block in its cluster
  uint32_t n_rank;

  struct Work {
    int32_t m_tile;  // of this block
    int32_t n_tile;
  };

  __device__ __forceinline__ int32_t works() const { return args.m_tiles * args.n_tiles; }
  __device__ __forceinline__ int32_t first_work() const {
    return static_cast<int32_t>(blockIdx.x) / kCluster;
  }
  __device__ __forceinline__ int32_t work_step() const {
    return static_cast<int32_t>(gridDim.x) / kCluster;
  }
  // A cluster's tiles in groups of kGroupM rows, column by column within a group: the clusters at
  // work then share few rows of a and of w, and L2 serves the repeats.
  __device__ __forceinline__ Work work_at(int32_t index) const {
    constexpr int32_t kGroupM = kTile.group_m;
    const int32_t group = index / (kGroupM * args.n_tiles);
    const int32_t group_rows = min(kGroupM, args.m_tiles - group * kGroupM);
    const int32_t in_group = index - group * kGroupM * args.n_tiles;
    return {(group * kGroupM + in_group % group_rows) * kClusterM + static_cast<int32_t>(m_rank),
            in_group / group_rows * kClusterN + static_cast<int32_t>(n_rank)};
  }

  // With the tile's last K-block come its factors, to `slot`.
  __device__ __forceinline__ void load_stage(const RingPlace& at, const Work& work, int32_t k_block,
                                             const RingPlace& slot, bool last) const {
    constexpr int kAShare = kBlockM / kClusterN;
    constexpr int kWShare = kBlockN / kClusterM;
    ring.wait_empty(at);
    if (last) slots.wait_empty(slot);
    const uint32_t full = ring.full_at(at);
    const int32_t n_first = work.n_tile * kBlockN;
    const FactorLoader<kQuantizes, kBlockN> loader(args, n_first, work.m_tile * kBlockM);
    ptx::mbarrier_arrive_expect_tx(full, kTile.stage_bytes() + (last ? loader.bytes() : 0));
    if (last) loader.load(factors[slot.stage], full);
    const uint32_t to = ptx::shared_address(stages) + at.stage * kTile.stage_bytes();
    const uint32_t to_a = to + n_rank * (kAShare * kBlockK);
    const uint32_t to_w = to + kABytes + m_rank * (kWShare * kBlockK);
    const auto row = static_cast<int32_t>(work.m_tile * kBlockM + n_rank * kAShare);
    const auto w_row = static_cast<int32_t>(n_first + m_rank * kWShare);
    const int32_t k = k_block * kBlockK;
    if constexpr (kClusterN == 1) {
      ptx::tma_load_2d(to_a, &args.a_map, full, k, row);
    } else {
      // Blocks m_rank, m_rank + kClusterM, ... have this row of tiles.
      uint32_t same_row = 0;
      for (int i = 0; i < kClusterN; ++i) same_row |= 1U << (i * kClusterM);
      ptx::tma_load_2d_multicast(to_a, &args.a_map, full, static_cast<uint16_t>(same_row << m_rank),
                                 k, row);
    }
    if constexpr (kClusterM == 1) {
      ptx::tma_load_2d(to_w, &args.w_map, full, k, w_row);
    } else {
      constexpr uint32_t kSameColumn = (1U << kClusterM) - 1;
      ptx::tma_load_2d_multicast(to_w, &args.w_map, full,
                                 static_cast<uint16_t>(kSameColumn << (n_rank * kClusterM)), k,
                                 w_row);
    }
  }

  __device__ __forceinline__ void produce() const {
    RingPlace at;
    RingPlace slot;
    for (int32_t index = first_work(); index < works(); index += work_step()) {
      const Work work = work_at(index);
      if constexpr (kQuantizes) wait_for_rows(args, work.m_tile * kBlockM);
      for (int32_t b = 0; b < args.k_blocks; ++b) {
        load_stage(at, work, b, slot, b + 1 == args.k_blocks);
        at.next(args.stages);
      }
      slot.next(args.factor_slots);
    }
  }

  // The warps that neither multiply nor drive the copy engine.
  __device__ __forceinline__ void quantize_beside() const {
    constexpr int kHelpers = StreamTile::kThreads / 32 - kWarpgroups * 4 - 1;
    const auto warps = static_cast<int32_t>(gridDim.x) * kHelpers;
    if constexpr (kSource == Source::kFloat16) {
      BackgroundQuantizer<__half>::run(args, warps);
    } else if constexpr (kSource == Source::kBFloat16) {
      BackgroundQuantizer<__nv_bfloat16>::run(args, warps);
    } else if constexpr (kSource == Source::kFloat32) {
      BackgroundQuantizer<float>::run(args, warps);
    }
  }

  struct Operands {
    static constexpr bool kRowFactors = kQuantizes;
    uint64_t first_a;
    uint64_t first_w;
    __device__ __forceinline__ uint64_t a(int32_t, uint32_t stage) const {
      return first_a + stage * (kTile.stage_bytes() >> 4);
    }
    __device__ __forceinline__ uint64_t w(uint32_t stage) const {
      return first_w + stage * (kTile.stage_bytes() >> 4);
    }
  };

  __device__ __forceinline__ void consume(int warpgroup) const {
    const int32_t wg_row = warpgroup * kWarpgroupM;
    const uint32_t first = ptx::shared_address(stages);
    Consumer<Tile, kOut, kCluster, kSets, 2, Operands> consumer{
        {ptx::wgmma_descriptor(first + wg_row * kBlockK), ptx::wgmma_descriptor(first + kABytes)},
        args,
        factors,
        ptx::shared_address(staging) + warpgroup * Tile::kStagingBytes,
        ring,
        slots};
    int32_t index = first_work();
    consumer.run([&](TilePlace& place) {
      if (index >= works()) return false;
      const Work work = work_at(index);
      index += work_step();
      if (index >= works()) ptx::grid_dependency_trigger();
      place.row_first = work.m_tile * kBlockM + wg_row;
      place.n_first = work.n_tile * kBlockN;
      if constexpr (!kQuantizes) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int32_t row = place.row_first + Tile::row_of_thread() + half * 8;
          place.row_scale[half] =
              args.epilogue.a_scale != nullptr && row < args.m ? args.epilogue.a_scale[row] : 0.0F;
        }
      }
      return true;
    });
  }

  static __device__ __forceinline__ void run(const GemmArgs& args) {
    extern __shared__ __align__(1024) uint8_t storage[];
    if (threadIdx.x == 0 && ptx::shared_address(storage) % 1024 != 0) __trap();
    const uint32_t rank = kCluster == 1 ? 0 : ptx::cluster_block_rank();
    // What is swizzled comes first, at multiples of 1024.
    uint8_t* const staging = storage + args.stages * kTile.stage_bytes();
    auto* const factors =
        reinterpret_cast<typename Tile::Factors*>(staging + kTile.staging_bytes());
    auto* const head = reinterpret_cast<Head*>(factors + args.factor_slots);
    const StreamKernel kernel{
        args,
        storage,
        staging,
        factors,
        {ptx::shared_address(head->ring.full), ptx::shared_address(head->ring.empty)},
        {0, ptx::shared_address(head->slots.empty)},
        rank % kClusterM,
        rank / kClusterM};

    if (threadIdx.x == 0) {
      ptx::prefetch_tensormap(&args.w_map);
      ptx::prefetch_tensormap(&args.a_map);
      for (int s = 0; s < kSm90MaxStages; ++s) {
        ptx::mbarrier_init(kernel.ring.full + s * 8, 1);
        ptx::mbarrier_init(kernel.ring.empty + s * 8, kReaders * kCluster);
      }
      for (int s = 0; s < kSm90MaxFactorSlots; ++s) {
        ptx::mbarrier_init(kernel.slots.empty + s * 8, kWarpgroups * kWarpgroupThreads);
      }
      ptx::fence_mbarrier_init();
    }
    if constexpr (kCluster == 1) {
      __syncthreads();
    } else {
      ptx::cluster_sync();
    }
    ptx::grid_dependency_wait();

    const int warpgroup = threadIdx.x / kWarpgroupThreads;
    if (warpgroup >= kWarpgroups) {
      ptx::set_max_registers_dec<kProducerRegisters>();
      const int warp = static_cast<int>(threadIdx.x) / 32 - kWarpgroups * 4;
      if (warp > 0) {
        kernel.quantize_beside();
      } else if (threadIdx.x % 32 == 0) {
        kernel.produce();
      }
    } else {
      ptx::set_max_registers_inc<kConsumerRegisters>();
      kernel.consume(warpgroup);
    }
    // A block's shared memory must outlive its stores, and the arrivals of its neighbours.
    if (threadIdx.x % kWarpgroupThreads == 0) ptx::bulk_wait_group_read<0>();
    if constexpr (kCluster > 1) {
      __syncwarp();
      ptx::cluster_sync();
    }
  }
};

template <int kTileIndex, Source kSource, DType kOut>
__global__ void __launch_bounds__(StreamTile::kThreads, 1)
    stream_kernel(const __grid_constant__ GemmArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  StreamKernel<kStreamTiles[kTileIndex], kSource, kOut>::run(args);
#endif
}

}  // namespace int8_ops::cuda::sm90
