// A query's splits become one: see Note [Order of a fold] in combine_args.cuh.
#pragma once

#include <cstdint>

#include "../ptx/grid_dependency.cuh"
#include "combine_args.cuh"

namespace int8_ops::cuda::attention {

__device__ __forceinline__ float4 scaled_add(float f, const float4& x, const float4& sum) {
  return make_float4(fmaf(f, x.x, sum.x), fmaf(f, x.y, sum.y), fmaf(f, x.z, sum.z),
                     fmaf(f, x.w, sum.w));
}

// The larger of all threads' values; NaN counts as less than any other.
__device__ __forceinline__ float block_maximum(float value, float* shared) {
#pragma unroll
  for (int32_t step = 16; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
#pragma unroll
  for (int32_t warp = 1; warp < kFoldWarps; ++warp) value = fmaxf(value, shared[warp]);
  return value;
}

__device__ __forceinline__ float4 added(const float4& a, const float4& b) {
  return make_float4(__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z),
                     __fadd_rn(a.w, b.w));
}

__device__ __forceinline__ float4 from_lane_xor(const float4& a, int32_t mask) {
  return make_float4(__shfl_xor_sync(~0u, a.x, mask), __shfl_xor_sync(~0u, a.y, mask),
                     __shfl_xor_sync(~0u, a.z, mask), __shfl_xor_sync(~0u, a.w, mask));
}

// A block folds kVectors vectors of columns of one query row.
template <int32_t kVectors>
__global__ void __launch_bounds__(kFoldThreads, 2)
    fold_splits_kernel(const __grid_constant__ CombineArgs args) {
  // Classes of a thread, and of a warp's lanes.
  constexpr int32_t kOwn = kVectors / (32 / kClassesApart);
  static_assert(kOwn == 1 || kOwn == kClassesApart);
  static_assert(kFoldAhead % kClassesApart == 0);
  __shared__ float maxima[kFoldWarps];
  __shared__ float4 sums[kFoldWarps][kVectors];
  __shared__ float totals[kFoldWarps];
  __shared__ float2 at_hand[kStatsAtHand];
  const LatentAttentionParams& p = args.p;
  const Partials& partials = args.partials;
  const auto block = static_cast<int32_t>(blockIdx.x);
  const int32_t row_number = args.by_chunks.quotient(block);
  const int32_t chunk = args.by_chunks.remainder(block);
  const int32_t batch_group = args.by_group_rows.quotient(row_number);
  const int32_t row = args.by_group_rows.remainder(row_number);
  // Before the wait: see Note [Lengths first].
  const DecodeRow tokens = decode_row(p, args.by_groups.quotient(batch_group));
  const int2 seen = tokens_seen(p, tokens, args.by_q_len.remainder(row));
  ptx::grid_dependency_wait();
  const int32_t tid = static_cast<int32_t>(threadIdx.x);
  const int32_t column = chunk * kVectors * 4 + tid;
  const bool writes = tid < kVectors * 4 && column < partials.columns;
  float* to = args.folded + static_cast<int64_t>(row_number) * partials.columns + column;
  if (seen.x >= seen.y) {
    if (writes) *to = 0.0F;
    return;
  }
  // The splits of which this query sees something: what it doesn't see was not written.
  const int32_t first = (seen.x - tokens.begin) / kSplitTokens;
  const int32_t last = (seen.y - tokens.begin + kSplitTokens - 1) / kSplitTokens;

  const int32_t warp = tid / 32;
  const int32_t vector = chunk * kVectors + tid % kVectors;
  const bool active = vector < partials.columns / 4;
  const float2* stats = partials.stats + partials.index(batch_group, 0, row);
  const int32_t row_vectors = partials.columns / 4;
  const auto* from = reinterpret_cast<const float4*>(partials.sums) +
                     partials.index(batch_group, 0, row) * row_vectors + vector;
  const int64_t stride = static_cast<int64_t>(partials.group_rows) * row_vectors;

  // Of the thread's splits the next kFoldAhead. One class: every 32nd; four: every eighth.
  constexpr int32_t kStep = kClasses / kOwn;
  float4 x[kFoldAhead];
  const auto load = [&](int32_t split) {
#pragma unroll
    for (int32_t i = 0; i < kFoldAhead; ++i, split += kStep) {
      x[i] = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
      if (split >= first && split < last && active) x[i] = __ldcg(from + split * stride);
    }
  };
  int32_t split = first / kClasses * kClasses + warp;
  if constexpr (kOwn == 1) split += tid % 32 / kVectors * kFoldWarps;
  load(split);
  // The largest score of all splits; of the first ones the statistics stay at hand.
  float most = -INFINITY;
  for (int32_t i = first + tid; i < last; i += kFoldThreads) {
    const float2 stat = __ldcg(stats + static_cast<int64_t>(i) * partials.group_rows);
    if (i - first < kStatsAtHand) at_hand[i - first] = stat;
    most = fmaxf(most, stat.x);
  }
  most = block_maximum(most, maxima);

  float total[kOwn] = {};
  float4 sum[kOwn] = {};
  while (split < last) {
#pragma unroll
    for (int32_t i = 0; i < kFoldAhead; ++i) {
      const int32_t number = split + i * kStep;
      if (number < first || number >= last) continue;
      const float2 stat = number - first < kStatsAtHand
                              ? at_hand[number - first]
                              : __ldcg(stats + static_cast<int64_t>(number) * partials.group_rows);
      const float factor = exp2f(stat.x - most);  // NaN where the split's own maximum is
      total[i % kOwn] = fmaf(factor, stat.y, total[i % kOwn]);
      sum[i % kOwn] = scaled_add(factor, x[i], sum[i % kOwn]);
    }
    split += kFoldAhead * kStep;
    if (split < last) load(split);
  }
  ptx::grid_dependency_trigger();

  if constexpr (kOwn == 1) {
#pragma unroll
    for (int32_t mask = kVectors; mask < 32; mask *= 2) {
      total[0] = __fadd_rn(total[0], __shfl_xor_sync(~0u, total[0], mask));
      sum[0] = added(sum[0], from_lane_xor(sum[0], mask));
    }
  } else {
    total[0] = __fadd_rn(__fadd_rn(total[0], total[1]), __fadd_rn(total[2], total[3]));
    sum[0] = added(added(sum[0], sum[1]), added(sum[2], sum[3]));
  }
  if (tid % 32 < kVectors) sums[warp][tid % 32] = sum[0];
  if (tid % 32 == 0) totals[warp] = total[0];
  __syncthreads();
  if (!writes) return;
  float y = 0.0F;
  float all = 0.0F;
#pragma unroll
  for (int32_t w = 0; w < kFoldWarps; ++w) {
    y = __fadd_rn(y, reinterpret_cast<const float*>(sums[w])[tid]);
    all = __fadd_rn(all, totals[w]);
  }
  *to = __fdiv_rn(y, all);
}

}  // namespace int8_ops::cuda::attention
