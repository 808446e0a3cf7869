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

// kRows: query rows that a block attends for. kSteps: steps of the keys' latents that stay in
// registers; 0: they are read again for every tile of pairs.
template <int kRows, int kSteps>
__global__ void __launch_bounds__(kThreads, 1)
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

  const int32_t total = SplitWalk::total(p);
  if (whole && worker < total) stage_panel(args, shared, head, 0);
  for (int32_t number = worker; number < total; number += args.workers) {
    SplitWalk walk = {p};
    walk.seek(number);
    const SplitPlace place = {walk.b, head.group, walk.split, walk.first_token(), walk.tokens()};
    const int32_t origin = p.origin != nullptr ? p.origin[walk.b] : -walk.row.begin;
    const int32_t row = head.head % args.group_heads * args.head_rows + head.first_row;
    const int64_t at =
        args.partials.index(static_cast<int64_t>(walk.b) * p.groups + head.group, walk.split, row);

    stage_scales(args, shared, place);
    const bool busy = static_cast<int32_t>(threadIdx.x) / 32 * kWarpTokens < place.tokens;
    StepLatents held[kSteps > 0 ? kSteps : 1];
    if constexpr (kSteps > 0) {
      StepWalk steps = {p.k};
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (busy && i < args.steps) load_step(args, place, steps.next(), held[i]);
      }
    }
    float scores[kRows][4] = {};
    for (int32_t tile = 0; tile < args.tiles; tile += args.panel_tiles) {
      if (!whole) {
        __syncthreads();
        stage_panel(args, shared, head, tile);
      }
      stage_queries<kRows>(args, shared, head, place, origin + place.begin, tile);
      __syncthreads();
      if (busy) score_panel<kRows, kSteps>(args, shared, head, place, tile, held, scores);
    }
    if (busy) store_scores<kRows>(args, shared, scores);
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
