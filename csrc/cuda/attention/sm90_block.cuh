// What all warps of a block of the Hopper path share: its share of the work, its shared memory and
// the barriers in it.
#pragma once

#include <cuda_fp16.h>

#include "../ptx/cluster.cuh"
#include "../ptx/cp_async.cuh"
#include "../ptx/mbarrier.cuh"
#include "../sm90/ring.cuh"
#include "sm90_plan.h"
#include "split_walk.cuh"

namespace int8_ops::cuda::attention {

using sm90::RingBarriers;
using sm90::RingPlace;

inline constexpr int kWarpgroup = 128;

// A place in a ring of two, in one register.
struct PairPlace {
  uint32_t count = 0;

  __device__ __forceinline__ operator RingPlace() const { return {stage(), count / 2 % 2}; }
  __device__ __forceinline__ uint32_t stage() const { return count % 2; }
  __device__ __forceinline__ void next() { ++count; }
};

// Blocks with the same part of A make a lane: some heads of a group, some of their query rows. The
// splits of all rows are shared out among the blocks of a lane.
struct BlockWork {
  int32_t heads;  // of a lane, at most
  Divisor group_lanes;
  int32_t lanes;
  int32_t first_lane;
  int32_t lane_step;
  int32_t first;  // splits [first, last) of every lane
  int32_t last;
};

// A split of a row for a lane: what the scheduling warp tells all others.
struct Task {
  int32_t stop;  // there are no more
  int32_t b;
  int32_t split;
  int32_t begin;  // of the row's tokens, and their end
  int32_t end;
  int32_t first_token;
  int32_t tokens;
  int32_t group;
  int32_t first_head;  // of the group
  int32_t heads;
  int32_t first_row;    // of a head's query rows
  int32_t lane_parity;  // the phase of A's barriers
  int32_t lane_starts;  // with this task
  int32_t lane_ends;

  __device__ __forceinline__ int32_t tiles() const {
    return (tokens + kTileTokens - 1) / kTileTokens;
  }
};

struct Barriers {
  sm90::StageBarriers<kMaxRingSlots> k[2];
  sm90::StageBarriers<kMaxRingSlots> v;
  sm90::StageBarriers<kTilesPerSplit> scores;
  sm90::StageBarriers<kQueryBuffers> queries;
  sm90::StageBarriers<1> weights;
  alignas(8) uint64_t a_full[kMaxQuads];
  alignas(8) uint64_t a_empty;
  sm90::StageBarriers<kTasks> tasks;
};

// A query row: its new token's number, and its own in the group, -1 where there is none.
struct RowFacts {
  int32_t new_token;
  int32_t group_row;
};

// Of the warpgroup that turns queries and makes weights, by row of the block.
struct WeightScratch {
  float2 turns[kQueryBuffers][kMaxPairs * 2];
  float inv_freq[kMaxPairs];
  float score_factor[kBlockRows];
  RowFacts rows[2][kBlockRows];  // of lanes of even and of odd number
  float2 stats[kBlockRows];
  float row_factor[kMaxSlices][kBlockRows];
};

__device__ __forceinline__ float2 half2_floats(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

struct BlockHead {
  Barriers barriers;
  BlockWork work;
  alignas(16) Task tasks[kTasks];
  alignas(16) WeightScratch scratch;
};
static_assert(sizeof(BlockHead) <= kHeadBytes);

__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

struct Block {
  const AttendArgs& args;
  uint8_t* storage;

  __device__ __forceinline__ uint32_t at(uint32_t offset) const {
    return ptx::shared_address(storage) + offset;
  }
  __device__ __forceinline__ BlockHead& head() const {
    return *reinterpret_cast<BlockHead*>(storage + args.plan.shared.head);
  }
  __device__ __forceinline__ Barriers& barriers() const { return head().barriers; }
  __device__ __forceinline__ WeightScratch& scratch() const { return head().scratch; }
  template <int kCount>
  static __device__ __forceinline__ RingBarriers ring(sm90::StageBarriers<kCount>& b) {
    return {ptx::shared_address(b.full), ptx::shared_address(b.empty)};
  }

  // By one warp, a lane of it a choice. How many heads a lane has is chosen here, where the lengths
  // are known: with few splits, lanes of few heads employ more blocks. No result depends on it.
  __device__ __forceinline__ void choose_work(SplitWalk& walk) const {
    const int32_t splits = walk.total();
    const int32_t mine = static_cast<int32_t>(threadIdx.x % 32) % args.plan.heads;
    const LaneChoice& choice = args.plan.choices[mine];
    const auto sharing_of = [](const LaneChoice& c) {
      return static_cast<int32_t>(c.sharing.divisor);
    };
    const int32_t rounds = choice.sharing.quotient(splits + sharing_of(choice) - 1) * choice.turns;
    const int32_t cycles = choice.first + max(rounds - 1, 0) * choice.next;
    const int32_t least = __reduce_min_sync(~0u, cycles);
    // Of equals the one with most heads, whose lanes read latents the fewest times.
    const int32_t best = __reduce_max_sync(~0u, cycles == least ? mine : 0);
    const LaneChoice& chosen = args.plan.choices[best];
    const auto block = static_cast<int32_t>(blockIdx.x);
    BlockWork& work = head().work;
    if (threadIdx.x % 32 != 0) return;
    work.heads = best + 1;
    work.group_lanes = chosen.group_lanes;
    work.lanes = chosen.lanes;
    work.first_lane = chosen.sharing.quotient(block);
    work.lane_step = chosen.lane_step;
    const int32_t part = block - work.first_lane * sharing_of(chosen);
    const int32_t each = chosen.sharing.quotient(splits);
    const int32_t rest = splits - each * sharing_of(chosen);  // parts with one more
    work.first = each * part + min(part, rest);
    work.last = work.first + each + static_cast<int32_t>(part < rest);
  }

  // The split that `walk` is at, for a lane.
  __device__ __forceinline__ void describe(const BlockWork& work, int32_t lane,
                                           const SplitWalk& walk, Task& task) const {
    const int32_t group = work.group_lanes.quotient(lane);
    const int32_t in_group = lane - group * static_cast<int32_t>(work.group_lanes.divisor);
    const int32_t set = args.by_row_blocks.quotient(in_group);
    task.stop = 0;
    task.b = walk.b;
    task.split = walk.split;
    task.begin = walk.row.begin;
    task.end = walk.row.end;
    task.first_token = walk.first_token();
    task.tokens = walk.tokens();
    task.group = group;
    task.first_head = set * work.heads;
    task.heads = min(work.heads, args.group_heads - task.first_head);
    task.first_row = (in_group - set * args.plan.row_blocks) * args.plan.quads * 4;
  }

  // Calls f(task) for each task, by all threads of a warp that takes part.
  template <typename OnTask>
  __device__ __forceinline__ void for_each_task(OnTask&& on_task) const {
    const RingBarriers ring = Block::ring(barriers().tasks);
    RingPlace at;
#pragma unroll 1
    for (;;) {
      ring.wait_full(at);
      const Task& task = head().tasks[at.stage];
      if (task.stop != 0) return;
      on_task(task);
      ptx::mbarrier_arrive(ring.empty_at(at));
      at.next(kTasks);
    }
  }
};

// Where a score of the block's query row and a token of a tile lies, in floats. The bits that are
// turned keep the lanes that write it apart.
__device__ __forceinline__ int32_t score_at(int32_t row, int32_t token) {
  return row * kTileTokens + (token ^ ((row & 2) * 8));
}

}  // namespace int8_ops::cuda::attention
