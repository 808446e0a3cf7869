// The first half of latent_attention_decode on Hopper.
//
//   A of some heads --copy engine, once--> shared memory ------------------\
//   latents of keys --copy engine--> boxes --ldmatrix--> registers --wgmma--> keys
//   queries --turned back by a tile's position--> shared memory --\           |
//                                                  scores <--wgmma-- keys, turned
//   scores --exponentials, token scales--> weights, float16 --\
//   latents of values --copy engine--> boxes ------------------wgmma--> sums --> global
//
// Five warpgroups: two make scores (sm90_scores.cuh), each of its own half of a tile of tokens, so
// that the tensor cores have one's products while the other's are turned; one turns the queries
// for them and makes weights of their scores (sm90_weights.cuh); one sums up, a split behind
// (sm90_sums.cuh); one drives the copy engine and hands out the splits (sm90_feed.cuh,
// sm90_block.cuh).
#pragma once

#include "../launch.cuh"
#include "../ptx/grid_dependency.cuh"
#include "sm90_feed.cuh"
#include "sm90_scores.cuh"
#include "sm90_sums.cuh"
#include "sm90_weights.cuh"

namespace int8_ops::cuda::attention {

// Registers of a thread: 96 at entry, which is what there is to share out; two warpgroups make
// scores.
inline constexpr uint32_t kFeedRegisters = 32;
inline constexpr uint32_t kScoreRegisters = 144;
inline constexpr uint32_t kWeightRegisters = 96;
inline constexpr uint32_t kSumRegisters = 64;
static_assert(kFeedRegisters + 2 * kScoreRegisters + kWeightRegisters + kSumRegisters <= 5 * 96);

template <int kSize, int kChunks, int kQuads>
__global__ void __launch_bounds__(kAttendThreads, 1)
    attend_kernel(const __grid_constant__ AttendArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t storage[];
  const Block block{args, storage};
  Barriers& barriers = block.barriers();
  if (threadIdx.x == 0) {
    if (ptx::shared_address(storage) % 1024 != 0) __trap();
    const auto init = [](auto& ring, uint32_t full, uint32_t empty) {
      for (uint64_t& barrier : ring.full) ptx::mbarrier_init(ptx::shared_address(&barrier), full);
      for (uint64_t& barrier : ring.empty) ptx::mbarrier_init(ptx::shared_address(&barrier), empty);
    };
    init(barriers.k[0], 1, kWarpgroup);
    init(barriers.k[1], 1, kWarpgroup);
    init(barriers.v, 1, kWarpgroup);
    init(barriers.scores, 2 * kWarpgroup, kWarpgroup);
    init(barriers.queries, kWarpgroup, 2 * kWarpgroup);
    init(barriers.weights, kWarpgroup, kWarpgroup);
    // All but the warp that hands them out.
    init(barriers.tasks, 1, kAttendThreads - 32);
    for (uint64_t& full : barriers.a_full) ptx::mbarrier_init(ptx::shared_address(&full), 1);
    ptx::mbarrier_init(ptx::shared_address(&barriers.a_empty), 2 * kWarpgroup);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::grid_dependency_wait();
  const int warpgroup = threadIdx.x / kWarpgroup;
  const int warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;
  if (warpgroup < 2) {
    ptx::set_max_registers_inc<kScoreRegisters>();
    ScoreMaker<kSize, kChunks, kQuads> scores{block,
                                              args,
                                              warpgroup,
                                              Block::ring(barriers.k[warpgroup]),
                                              Block::ring(barriers.queries),
                                              Block::ring(barriers.scores),
                                              {},
                                              {}};
    scores.run();
  } else if (warpgroup == 2) {
    ptx::set_max_registers_dec<kWeightRegisters>();
    WeightMaker<kSize> weights{block,
                               args,
                               Block::ring(barriers.queries),
                               Block::ring(barriers.scores),
                               Block::ring(barriers.weights),
                               {},
                               {},
                               warp,
                               lane};
    weights.run();
  } else if (warpgroup == 3) {
    ptx::set_max_registers_dec<kSumRegisters>();
    SumMaker<kQuads> sums{block, args, Block::ring(barriers.v), Block::ring(barriers.weights),
                          {},    {}};
    sums.run();
    ptx::grid_dependency_trigger();
  } else {
    SplitWalk walk{args.p};
    if (warp == 3) block.choose_work(walk);
    ptx::set_max_registers_dec<kFeedRegisters>();
    const Feed feed{block, args};
    feed.prefetch_maps(warp);
    if (warp == 0) feed.load_keys(0);
    if (warp == 1) feed.load_keys(1);
    if (warp == 2) feed.template load_values<kSize>();
    if (warp == 3) feed.schedule(walk);
  }
#endif
}

}  // namespace int8_ops::cuda::attention
