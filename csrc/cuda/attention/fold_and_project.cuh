// The second half in one kernel, with the bits of fold.cuh and project.cuh.
#pragma once

#include <cstdint>

#include "../ptx/grid_dependency.cuh"
#include "fold.cuh"
#include "project.cuh"

namespace int8_ops::cuda::attention {

// One block folds its query rows and projects them: where splits are few, the second launch would
// cost more than folding the rows once for each part of the head.
__global__ void __launch_bounds__(kFoldThreads)
    fold_and_project_kernel(const __grid_constant__ CombineArgs args) {
  extern __shared__ __align__(16) float folded[];  // [kProjectRows][columns]
  const RowTile tile(args, static_cast<int32_t>(blockIdx.x));
  prefetch_a<kFoldWarps>(args, tile);
  const LatentAttentionParams& p = args.p;
  const Partials& partials = args.partials;
  const DecodeRow tokens = decode_row(p, tile.batch);
  ptx::grid_dependency_wait();
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32;
  const int32_t row_vectors = partials.columns / 4;
  const int64_t stride = static_cast<int64_t>(partials.group_rows) * row_vectors;
  const int32_t rows = min(kProjectRows, args.head_rows - tile.first_row);
  // A warp folds 32 vectors of columns of a row. Each class has one split, the lane's.
  const auto items = rows * static_cast<int32_t>(args.by_chunks.divisor);
  for (int32_t item = warp; item < items; item += kFoldWarps) {
    const int32_t r = args.by_chunks.quotient(item);
    const int32_t vector = args.by_chunks.remainder(item) * 32 + lane;
    const int2 seen = tokens_seen(p, tokens, args.by_q_len.remainder(tile.row(args, r)));
    auto* to = reinterpret_cast<float4*>(folded) + r * row_vectors + vector;
    if (seen.x >= seen.y) {
      if (vector < row_vectors) *to = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
      continue;
    }
    const int32_t first = (seen.x - tokens.begin) / kSplitTokens;
    const int32_t last = (seen.y - tokens.begin + kSplitTokens - 1) / kSplitTokens;
    const int64_t at = partials.index(tile.batch_group(args), 0, tile.group_row(args, r));
    const auto* from = reinterpret_cast<const float4*>(partials.sums) + at * row_vectors + vector;
    const bool there = lane >= first && lane < last;
    float2 stat = make_float2(-INFINITY, 0.0F);
    if (there)
      stat = __ldcg(partials.stats + at + lane * static_cast<int64_t>(partials.group_rows));
    float4 x[kClasses];
#pragma unroll
    for (int32_t i = 0; i < kClasses; ++i) {
      x[i] = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
      if (i >= first && i < last && vector < row_vectors) x[i] = __ldcg(from + i * stride);
    }
    float most = stat.x;
#pragma unroll
    for (int32_t step = 16; step > 0; step /= 2) {
      most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    }
    const float factor = there ? exp2f(stat.x - most) : 0.0F;
    const float share = fmaf(factor, stat.y, 0.0F);
    float4 sum = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    float total = 0.0F;
#pragma unroll
    for (int32_t w = 0; w < kFoldWarps; ++w) {
      float4 own[kClassesApart];
      float part[kClassesApart];
#pragma unroll
      for (int32_t k = 0; k < kClassesApart; ++k) {
        const int32_t split = w + k * kFoldWarps;
        own[k] = scaled_add(__shfl_sync(~0u, factor, split), x[split],
                            make_float4(0.0F, 0.0F, 0.0F, 0.0F));
        part[k] = __shfl_sync(~0u, share, split);
      }
      sum = added(sum, added(added(own[0], own[1]), added(own[2], own[3])));
      total = __fadd_rn(total, __fadd_rn(__fadd_rn(part[0], part[1]), __fadd_rn(part[2], part[3])));
    }
    if (vector >= row_vectors) continue;
    *to = make_float4(__fdiv_rn(sum.x, total), __fdiv_rn(sum.y, total), __fdiv_rn(sum.z, total),
                      __fdiv_rn(sum.w, total));
  }
  ptx::grid_dependency_trigger();
  __syncthreads();
  const float* means[kProjectRows];
#pragma unroll
  for (int32_t r = 0; r < kProjectRows; ++r) {
    means[r] = folded + min(r, rows - 1) * partials.columns;
  }
  project_part<kFoldWarps>(args, tile, tokens, means);
}

}  // namespace int8_ops::cuda::attention
