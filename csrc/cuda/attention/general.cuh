// The kernel of the general path: see Note [General path] in general_args.cuh.
#pragma once

#include <cstdint>

#include "../ptx/grid_dependency.cuh"
#include "general_args.cuh"
#include "general_scores.cuh"
#include "general_stage.cuh"
#include "general_sums.cuh"
#include "split_walk.cuh"

namespace int8_ops::cuda::attention {

// Blocks that share a multiprocessor: where the registers of one are few enough.
template <int kRows, bool kHeld>
inline constexpr int kBlocksPerSm = kHeld && kRows <= 4 ? 2 : 1;

// kRows: query rows that a block attends for. kHeld: the keys' latents stay in registers.
template <int kRows, bool kHeld>
__global__ void __launch_bounds__(kThreads, kHeld&& kRows <= 4 ? 2 : 1)
    general_attend_kernel(const __grid_constant__ GeneralArgs args) {
  extern __shared__ __align__(16) char shared[];
  ptx::grid_dependency_wait();
  const LatentAttentionParams& p = args.p;
  const int32_t lane = static_cast<int32_t>(blockIdx.x) % args.lanes;
  const int32_t worker = static_cast<int32_t>(blockIdx.x) / args.lanes;
  HeadPlace head;
  head.head = lane / args.row_blocks;
  head.group = head.head / args.group_heads;
  head.first_row = lane % args.row_blocks * kRows;
  head.rows = min(kRows, args.head_rows - head.first_row);
  const bool whole = args.panel_tiles >= args.tiles;

  find_queries(args, shared, head);
  const int32_t total = SplitWalk{p}.total();
  if (whole && worker < total) stage_panel(args, shared, head, 0);
  __syncthreads();
  for (int32_t number = worker; number < total; number += args.workers) {
    SplitWalk walk{p};
    walk.seek(number);
    const SplitPlace place = {walk.b, head.group, walk.split, walk.first_token(), walk.tokens()};
    const int32_t origin = p.origin != nullptr ? p.origin[walk.b] : -walk.row.begin;
    const int32_t row = head.head % args.group_heads * args.head_rows + head.first_row;
    const int64_t at =
        args.partials.index(static_cast<int64_t>(walk.b) * p.groups + head.group, walk.split, row);

    stage_scales(args, shared, place);
    for (int32_t first = 0; first < args.tiles; first += args.panel_tiles) {
      if (!whole) {
        __syncthreads();
        stage_panel(args, shared, head, first);
      }
      stage_queries<kRows>(args, shared, head, place, origin + place.begin, first);
      ptx::cp_async_wait_group<0>();
      __syncthreads();
      const int32_t tiles = min(args.panel_tiles, args.tiles - first);
#pragma unroll 1
      for (int32_t pass = 0; pass < kWarpTokens / 16; ++pass) {
        if (first_token(pass) >= place.tokens) break;
        float scores[kRows][2] = {};
        if constexpr (kHeld) {
          score_held<kRows>(args, shared, place, tiles, pass, scores);
        } else {
          score_streamed<kRows>(args, shared, head, place, first, tiles, pass, scores);
        }
        store_scores<kRows>(args, shared, pass, first > 0, scores);
      }
    }
    __syncthreads();
    weigh_rows<kRows>(args, shared, head, place, walk.row, args.partials.stats + at);
    for (int32_t n = 0; n < p.v.count; ++n) {
      __syncthreads();
      scale_weights<kRows>(args, shared, head, place, p.v.slices[n]);
      __syncthreads();
      sum_slice<kRows>(
          args, shared, head, place, n,
          args.partials.sums + at * args.partials.columns + args.partials.column_of[n]);
    }
  }
  ptx::grid_dependency_trigger();
}

}  // namespace int8_ops::cuda::attention
