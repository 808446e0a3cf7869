// What drives the copy engine for a block of the Hopper path: a warp for each warpgroup's latents
// of keys, one for A and the latents of values, and one that hands out the tasks.
#pragma once

#include "../ptx/load_global.cuh"
#include "../ptx/tma.cuh"
#include "sm90_block.cuh"

namespace int8_ops::cuda::attention {

struct Feed {
  const Block& block;
  const AttendArgs& args;

  static constexpr int32_t kLineFloats = 128 / sizeof(float);

  __device__ __forceinline__ bool elected() const { return threadIdx.x % 32 == 0; }

  // The copy engine's descriptions of what a warp asks for, while it waits for the first task.
  __device__ __forceinline__ void prefetch_maps(int warp) const {
    if (!elected()) return;
    for (int32_t slice = 0; slice < args.p.k.count && warp < 2; ++slice) {
      ptx::prefetch_tensormap(warp == 0 ? &args.k_maps[slice] : &args.a_maps[slice]);
    }
    for (int32_t slice = 0; slice < args.p.v.count && warp == 2; ++slice) {
      ptx::prefetch_tensormap(&args.v_maps[slice]);
    }
  }

  __device__ __forceinline__ void load_box(const RingBarriers& ring, RingPlace& at, uint32_t slots,
                                           uint32_t boxes, const CUtensorMap* map, int32_t column,
                                           int32_t token, const Task& task) const {
    ring.wait_empty(at);
    if (elected()) {
      ptx::mbarrier_arrive_expect_tx(ring.full_at(at), kBoxBytes);
      ptx::tma_load_4d(boxes + at.stage * kBoxBytes, map, ring.full_at(at), column, token,
                       task.group, task.b);
    }
    at.next(slots);
  }

  __device__ __forceinline__ void load_keys(int warpgroup) const {
    const RingBarriers ring = Block::ring(block.barriers().k[warpgroup]);
    const auto slots = static_cast<uint32_t>(args.plan.shared.k_slots);
    const uint32_t boxes = block.at(args.plan.shared.k_ring) + warpgroup * slots * kBoxBytes;
    RingPlace at;
    block.for_each_task([&](const Task& task) {
      const int32_t tiles = task.tiles();
      for (int32_t tile = 0; tile < tiles; ++tile) {
        const int32_t token = task.first_token + tile * kTileTokens + warpgroup * kBoxTokens;
        for (int32_t slice = 0; slice < args.p.k.count; ++slice) {
          const int32_t width = width_of(args.p.k.slices[slice]);
          for (int32_t column = 0; column < width; column += kBoxWidth) {
            load_box(ring, at, slots, boxes, &args.k_maps[slice], column, token, task);
          }
        }
      }
    });
  }

  // A of a lane's heads, [heads][steps][chunks] boxes of 64 rows: 32 RoPE pairs, their first halves
  // and then their second ones. By one thread.
  template <int kSize>
  __device__ __forceinline__ void load_a(const Task& task) const {
    constexpr int kSteps = kSize / kStepChannels;
    const uint32_t full = ptx::shared_address(block.barriers().a_full);
    ptx::mbarrier_wait_parity(ptx::shared_address(&block.barriers().a_empty), task.lane_parity ^ 1);
    uint32_t to = block.at(0);
    for (int32_t head = 0; head < task.heads; ++head) {
      const uint32_t barrier = full + head * 8;
      // Two heads at a time: what others ask of memory is not to wait for all of A.
      if (head > 1) ptx::mbarrier_wait_parity(barrier - 16, task.lane_parity);
      ptx::mbarrier_arrive_expect_tx(barrier, kSteps * args.plan.chunks * kBoxBytes);
      for (int step = 0; step < kSteps; ++step) {
        const int32_t row =
            (task.group * args.group_heads + task.first_head + head) * kSize + step * 32;
        for (int32_t slice = 0; slice < args.p.k.count; ++slice) {
          const LatentSlice& s = args.p.k.slices[slice];
          for (int32_t chunk = 0; chunk < args.k_chunks[slice]; ++chunk) {
            // Of a packed slice chunks of low and of high halves take turns.
            const int32_t column =
                s.packed ? chunk / 2 * kBoxWidth + chunk % 2 * static_cast<int32_t>(s.rank / 2)
                         : chunk * kBoxWidth;
            ptx::tma_load_2d(to, &args.a_maps[slice], barrier, column, row);
            ptx::tma_load_2d(to + kBoxBytes / 2, &args.a_maps[slice], barrier, column,
                             row + kSize / 2);
            to += kBoxBytes;
          }
        }
      }
    }
    ptx::mbarrier_wait_parity(full + (task.heads - 1) * 8, task.lane_parity);
    // Barriers of heads that this lane lacks go through the phase as well.
    for (int32_t head = task.heads; head < kMaxQuads; ++head) ptx::mbarrier_arrive(full + head * 8);
  }

  // Of a task, with their scales, to L2: the ring has room for a few boxes, and memory is farther
  // away than their turn.
  __device__ __forceinline__ void prefetch_values(const Task& task) const {
    for (int32_t slice = 0; slice < args.p.v.count; ++slice) {
      const LatentSlice& s = args.p.v.slices[slice];
      const float* const scales = s.scale + task.b * s.scale_batch_stride +
                                  task.group * s.scale_group_stride + task.first_token;
      for (int32_t token = 0; token < task.tokens; token += kLineFloats) {
        ptx::prefetch_global_l2(scales + token);
      }
      for (int32_t column = 0; column < width_of(s); column += kBoxWidth) {
        for (int32_t token = 0; token < task.tokens; token += kBoxTokens) {
          ptx::tma_prefetch_4d(&args.v_maps[slice], column, task.first_token + token, task.group,
                               task.b);
        }
      }
    }
  }

  // And each lane's A before.
  template <int kSize>
  __device__ __forceinline__ void load_values() const {
    const RingBarriers ring = Block::ring(block.barriers().v);
    const auto slots = static_cast<uint32_t>(args.plan.shared.v_slots);
    RingPlace at;
    block.for_each_task([&](const Task& task) {
      if (task.lane_starts != 0 && elected()) load_a<kSize>(task);
      __syncwarp();
      if (elected()) prefetch_values(task);
      for (int32_t slice = 0; slice < args.p.v.count; ++slice) {
        const LatentSlice& s = args.p.v.slices[slice];
        for (int32_t column = 0; column < width_of(s); column += value_columns(s.packed)) {
          for (int32_t token = 0; token < task.tokens; token += kBoxTokens) {
            load_box(ring, at, slots, block.at(args.plan.shared.v_ring), &args.v_maps[slice],
                     column, task.first_token + token, task);
          }
        }
      }
    });
  }

  // Tells all others what to do: by one warp.
  __device__ __forceinline__ void schedule(SplitWalk& walk) const {
    const BlockWork& work = block.head().work;
    __syncwarp();
    const RingBarriers ring = Block::ring(block.barriers().tasks);
    RingPlace at;
    int32_t parity = 0;
    for (int32_t lane = work.first_lane; lane < work.lanes && work.first < work.last;
         lane += work.lane_step) {
      walk.seek(work.first);
      for (int32_t i = work.first; i < work.last; ++i) {
        if (i > work.first) walk.next();
        ring.wait_empty(at);
        Task& task = block.head().tasks[at.stage];
        if (elected()) {
          block.describe(work, lane, walk, task);
          task.lane_parity = parity;
          task.lane_starts = static_cast<int32_t>(i == work.first);
          task.lane_ends = static_cast<int32_t>(i + 1 == work.last);
          ptx::mbarrier_arrive(ring.full_at(at));
        }
        at.next(kTasks);
      }
      parity ^= 1;
    }
    ring.wait_empty(at);
    if (elected()) {
      block.head().tasks[at.stage].stop = 1;
      ptx::mbarrier_arrive(ring.full_at(at));
    }
  }
};

}  // namespace int8_ops::cuda::attention
