// The second half of latent_attention_decode: a query's splits become one, and the values' A is
// applied. Two kernels, for every path of the first half.
//
// Note [Order of a fold]
// A split's share is added by the class that its number names, number % kClasses, in ascending
// order; the classes' sums are added in a fixed order. Numbers count from the row's own first
// token, so what a window hides or other rows have changes nothing. Products and sums are written
// as fmaf: what the compiler contracts could differ between two kernels.
#pragma once

#include <cstdint>

#include "../epilogue/convert.cuh"
#include "../ptx/grid_dependency.cuh"
#include "partials.h"

namespace int8_ops::cuda::attention {

inline constexpr int32_t kFoldThreads = 256;
inline constexpr int32_t kFoldVectors = 16;  // of four columns, a thread each
inline constexpr int32_t kClasses = kFoldThreads / kFoldVectors;
inline constexpr int32_t kFoldAhead = 8;  // splits whose loads a thread has under way

inline constexpr int32_t kProjectThreads = 128;
inline constexpr int32_t kProjectRows = 4;      // query rows that share the loads of A
inline constexpr int32_t kProjectElements = 2;  // of the head, a warp
inline constexpr int32_t kBlockElements = kProjectThreads / 32 * kProjectElements;

struct CombineArgs {
  LatentAttentionParams p;
  Partials partials;
  float* folded;              // [batch][groups][group_rows][columns]: weighted means of the latents
  int32_t chunks;             // fold: of kFoldVectors vectors of columns
  int32_t head_rows;          // query rows a KV head: heads / kv_heads * q_len
  int32_t row_tiles;          // project: of kProjectRows query rows of a head
  int32_t parts;              // project: of kBlockElements elements of the head
  bool vector_a[kMaxSlices];  // rows of A start 4-byte aligned and end so
};

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
  for (int32_t warp = 1; warp < kFoldThreads / 32; ++warp) value = fmaxf(value, shared[warp]);
  return value;
}

// A block folds kFoldVectors vectors of columns of one query row.
__global__ void __launch_bounds__(kFoldThreads)
    fold_splits_kernel(const __grid_constant__ CombineArgs args) {
  constexpr int32_t kWarps = kFoldThreads / 32;
  __shared__ float maxima[kWarps];
  __shared__ float4 sums[kWarps][kFoldVectors];
  __shared__ float totals[kWarps];
  ptx::grid_dependency_wait();
  const LatentAttentionParams& p = args.p;
  const Partials& partials = args.partials;
  const int32_t chunk = static_cast<int32_t>(blockIdx.x) % args.chunks;
  const int32_t row_number = static_cast<int32_t>(blockIdx.x) / args.chunks;
  const int32_t batch_group = row_number / partials.group_rows;
  const int32_t row = row_number % partials.group_rows;
  const DecodeRow tokens = decode_row(p, batch_group / p.groups);
  const int2 seen = tokens_seen(p, tokens, row % static_cast<int32_t>(p.q_len));
  if (seen.x >= seen.y) return;
  // The splits of which this query sees something: what it doesn't see was not written.
  const int32_t first = (seen.x - tokens.begin) / kSplitTokens;
  const int32_t last = (seen.y - tokens.begin + kSplitTokens - 1) / kSplitTokens;

  const int32_t tid = static_cast<int32_t>(threadIdx.x);
  const int32_t vector = chunk * kFoldVectors + tid % kFoldVectors;
  const bool active = vector < partials.columns / 4;
  const float2* stats = partials.stats + partials.index(batch_group, 0, row);
  const auto* from = reinterpret_cast<const float4*>(
                         partials.sums + partials.index(batch_group, 0, row) * partials.columns) +
                     vector;
  const int64_t stride = static_cast<int64_t>(partials.group_rows) * (partials.columns / 4);
  const auto offset = [&](int32_t split) {
    return static_cast<int64_t>(split) * partials.group_rows;
  };

  float2 stat[kFoldAhead];
  float4 x[kFoldAhead];
  const auto load = [&](int32_t split) {
#pragma unroll
    for (int32_t i = 0; i < kFoldAhead; ++i, split += kClasses) {
      const bool there = split < last;
      stat[i] = there ? __ldcg(stats + offset(split)) : make_float2(-INFINITY, 0.0F);
      x[i] = there && active ? __ldcg(from + split * stride) : make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    }
  };
  int32_t split = first + (tid / kFoldVectors - first % kClasses + kClasses) % kClasses;
  load(split);
  float most = -INFINITY;
  for (int32_t i = first + tid; i < last; i += kFoldThreads) {
    most = fmaxf(most, __ldcg(&stats[offset(i)].x));
  }
  most = block_maximum(most, maxima);

  float total = 0.0F;
  float4 sum = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
  while (split < last) {
#pragma unroll
    for (int32_t i = 0; i < kFoldAhead; ++i) {
      if (split + i * kClasses >= last) break;
      // NaN where the split's own maximum is.
      const float factor = exp2f(stat[i].x - most);
      total = fmaf(factor, stat[i].y, total);
      sum = scaled_add(factor, x[i], sum);
    }
    split += kFoldAhead * kClasses;
    if (split < last) load(split);
  }
  ptx::grid_dependency_trigger();

  // Two classes a warp, then the warps in order.
  total = __fadd_rn(total, __shfl_xor_sync(~0u, total, kFoldVectors));
  sum.x = __fadd_rn(sum.x, __shfl_xor_sync(~0u, sum.x, kFoldVectors));
  sum.y = __fadd_rn(sum.y, __shfl_xor_sync(~0u, sum.y, kFoldVectors));
  sum.z = __fadd_rn(sum.z, __shfl_xor_sync(~0u, sum.z, kFoldVectors));
  sum.w = __fadd_rn(sum.w, __shfl_xor_sync(~0u, sum.w, kFoldVectors));
  if (tid % 32 < kFoldVectors) sums[tid / 32][tid % 32] = sum;
  if (tid % 32 == 0) totals[tid / 32] = total;
  __syncthreads();
  const int32_t column = chunk * kFoldVectors * 4 + tid;
  if (tid >= kFoldVectors * 4 || column >= partials.columns) return;
  float y = 0.0F;
  total = 0.0F;
#pragma unroll
  for (int32_t warp = 0; warp < kWarps; ++warp) {
    y = __fadd_rn(y, reinterpret_cast<const float*>(sums[warp])[tid]);
    total = __fadd_rn(total, totals[warp]);
  }
  args.folded[static_cast<int64_t>(row_number) * partials.columns + column] = __fdiv_rn(y, total);
}

// Four values of a row of A from `column` on, zeros past its end.
__device__ __forceinline__ void load_a(const int8_t* row, int32_t column, int32_t rank, bool vector,
                                       float (&a)[4]) {
  uint32_t word = 0;
  if (vector) {
    if (column < rank) word = __ldg(reinterpret_cast<const uint32_t*>(row + column));
  } else {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      if (column + i < rank) {
        word |= static_cast<uint32_t>(static_cast<uint8_t>(__ldg(row + column + i))) << (8 * i);
      }
    }
  }
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) a[i] = static_cast<float>(static_cast<int8_t>(word >> (8 * i)));
}

// A warp makes kProjectElements elements of kProjectRows query rows of a head; its lanes share the
// columns, four at a time.
__global__ void __launch_bounds__(kProjectThreads, 1)
    project_kernel(const __grid_constant__ CombineArgs args) {
  ptx::grid_dependency_wait();
  const LatentAttentionParams& p = args.p;
  const Partials& partials = args.partials;
  int32_t block = static_cast<int32_t>(blockIdx.x);
  const int32_t part = block % args.parts;
  block /= args.parts;
  const int32_t row_tile = block % args.row_tiles;
  block /= args.row_tiles;
  const auto kv_heads = static_cast<int32_t>(p.kv_heads);
  const auto group_heads = static_cast<int32_t>(p.kv_heads / p.groups);
  const auto q_len = static_cast<int32_t>(p.q_len);
  const int32_t head = block % kv_heads;
  const int32_t b = block / kv_heads;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32;
  const int32_t first_row = row_tile * kProjectRows;
  const int32_t element = part * kBlockElements + warp * kProjectElements;
  const auto head_dim = static_cast<int32_t>(p.head_dim);
  if (element >= head_dim) return;

  const DecodeRow tokens = decode_row(p, b);
  const float* means[kProjectRows];
  bool any[kProjectRows];
#pragma unroll
  for (int32_t r = 0; r < kProjectRows; ++r) {
    // Rows past the last one repeat it.
    const int32_t row = min(first_row + r, args.head_rows - 1);
    const int2 seen = tokens_seen(p, tokens, row % q_len);
    any[r] = seen.x < seen.y;
    const int64_t batch_group = static_cast<int64_t>(b) * p.groups + head / group_heads;
    const int64_t at = batch_group * partials.group_rows +
                       static_cast<int64_t>(head % group_heads) * args.head_rows + row;
    means[r] = args.folded + at * partials.columns;
  }

  float sum[kProjectElements][kProjectRows] = {};
  for (int32_t n = 0; n < p.v.count; ++n) {
    const LatentSlice& s = p.v.slices[n];
    const auto rank = static_cast<int32_t>(s.rank);
    const int64_t a_row = static_cast<int64_t>(head) * head_dim + element;
    float own[kProjectElements][kProjectRows] = {};
#pragma unroll 2
    for (int32_t column = lane * 4; column < rank; column += 128) {
      float a[kProjectElements][4];
#pragma unroll
      for (int32_t e = 0; e < kProjectElements; ++e) {
        load_a(s.a + (a_row + e) * rank, column, rank, args.vector_a[n], a[e]);
      }
#pragma unroll
      for (int32_t r = 0; r < kProjectRows; ++r) {
        if (!any[r]) continue;  // nothing was written
        // Columns are padded to fours, and what the padding holds is not to be multiplied.
        float4 x =
            __ldcg(reinterpret_cast<const float4*>(means[r] + partials.column_of[n] + column));
        if (column + 1 >= rank) x.y = 0.0F;
        if (column + 2 >= rank) x.z = 0.0F;
        if (column + 3 >= rank) x.w = 0.0F;
#pragma unroll
        for (int32_t e = 0; e < kProjectElements; ++e) {
          own[e][r] = fmaf(a[e][0], x.x, own[e][r]);
          own[e][r] = fmaf(a[e][1], x.y, own[e][r]);
          own[e][r] = fmaf(a[e][2], x.z, own[e][r]);
          own[e][r] = fmaf(a[e][3], x.w, own[e][r]);
        }
      }
    }
#pragma unroll
    for (int32_t e = 0; e < kProjectElements; ++e) {
      const float scale = __ldg(s.a_scale + a_row + e);
#pragma unroll
      for (int32_t r = 0; r < kProjectRows; ++r) sum[e][r] = fmaf(own[e][r], scale, sum[e][r]);
    }
  }
  ptx::grid_dependency_trigger();

  // Lanes are added in the same order whatever the row: halves, quarters and so on. The first
  // three steps leave each lane with one of the warp's sums.
  static_assert(kProjectElements == 2 && kProjectRows == 4);
  float four[4];
#pragma unroll
  for (int32_t r = 0; r < 4; ++r) {
    const float mine = lane & 16 ? sum[1][r] : sum[0][r];
    const float other = lane & 16 ? sum[0][r] : sum[1][r];
    four[r] = __fadd_rn(mine, __shfl_xor_sync(~0u, other, 16));
  }
  float two[2];
#pragma unroll
  for (int32_t r = 0; r < 2; ++r) {
    const float mine = lane & 8 ? four[2 + r] : four[r];
    const float other = lane & 8 ? four[r] : four[2 + r];
    two[r] = __fadd_rn(mine, __shfl_xor_sync(~0u, other, 8));
  }
  const float mine = lane & 4 ? two[1] : two[0];
  const float other = lane & 4 ? two[0] : two[1];
  float y = __fadd_rn(mine, __shfl_xor_sync(~0u, other, 4));
  y = __fadd_rn(y, __shfl_xor_sync(~0u, y, 2));
  y = __fadd_rn(y, __shfl_xor_sync(~0u, y, 1));

  const int32_t e = lane / 16;
  const int32_t r = lane / 4 % 4;
  const int32_t row = first_row + r;
  if (lane % 4 != 0 || row >= args.head_rows) return;
  const int64_t channel = static_cast<int64_t>(head) * head_dim + element + e;
  if (p.v.bias != nullptr) y = __fadd_rn(y, load_float(p.v.bias, p.v.bias_dtype, channel));
  const int64_t query_head = static_cast<int64_t>(head) * (args.head_rows / q_len) + row / q_len;
  const int64_t at =
      ((static_cast<int64_t>(b) * q_len + row % q_len) * p.heads + query_head) * head_dim +
      element + e;
  const int2 seen = tokens_seen(p, tokens, row % q_len);
  store_float(p.out, p.q_dtype, at, seen.x < seen.y ? y : 0.0F);
}

}  // namespace int8_ops::cuda::attention
