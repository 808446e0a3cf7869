// The values' A times what queries have summed up of latents.
#pragma once

#include <cstdint>

#include "../epilogue/convert.cuh"
#include "../ptx/grid_dependency.cuh"
#include "combine_args.cuh"

namespace int8_ops::cuda::attention {

// Some query rows of a head.
struct RowTile {
  int32_t batch;
  int32_t head;  // KV head
  int32_t first_row;
  int32_t part;  // of the head's elements

  // Of a block; they are numbered parts first.
  __device__ __forceinline__ RowTile(const CombineArgs& args, int32_t block) {
    part = block % args.parts;
    block /= args.parts;
    first_row = block % args.row_tiles * kProjectRows;
    block /= args.row_tiles;
    head = block % static_cast<int32_t>(args.p.kv_heads);
    batch = block / static_cast<int32_t>(args.p.kv_heads);
  }

  // Rows past the last one repeat it.
  __device__ __forceinline__ int32_t row(const CombineArgs& args, int32_t r) const {
    return min(first_row + r, args.head_rows - 1);
  }
  __device__ __forceinline__ int32_t batch_group(const CombineArgs& args) const {
    const auto groups = static_cast<int32_t>(args.p.groups);
    return batch * groups + head / (static_cast<int32_t>(args.p.kv_heads) / groups);
  }
  // The row's number within its group.
  __device__ __forceinline__ int32_t group_row(const CombineArgs& args, int32_t r) const {
    const auto groups = static_cast<int32_t>(args.p.groups);
    return head % (static_cast<int32_t>(args.p.kv_heads) / groups) * args.head_rows + row(args, r);
  }
};

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

// A warp makes kProjectElements elements of kProjectRows query rows of a head, from the rows'
// means; its lanes share the columns, four at a time.
__device__ __forceinline__ void project_rows(const CombineArgs& args, const RowTile& tile,
                                             int32_t element,
                                             const float* const (&means)[kProjectRows]) {
  const LatentAttentionParams& p = args.p;
  const auto q_len = static_cast<int32_t>(p.q_len);
  const auto head_dim = static_cast<int32_t>(p.head_dim);
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const DecodeRow tokens = decode_row(p, tile.batch);
  bool any[kProjectRows];
#pragma unroll
  for (int32_t r = 0; r < kProjectRows; ++r) {
    const int2 seen = tokens_seen(p, tokens, tile.row(args, r) % q_len);
    any[r] = seen.x < seen.y;
  }
  float sum[kProjectElements][kProjectRows] = {};
  for (int32_t n = 0; n < p.v.count; ++n) {
    const LatentSlice& s = p.v.slices[n];
    const auto rank = static_cast<int32_t>(s.rank);
    const int64_t a_row = static_cast<int64_t>(tile.head) * head_dim + element;
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
        float4 x = *reinterpret_cast<const float4*>(means[r] + args.partials.column_of[n] + column);
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
  const int32_t row = tile.first_row + r;
  if (lane % 4 != 0 || row >= args.head_rows) return;
  const int64_t channel = static_cast<int64_t>(tile.head) * head_dim + element + e;
  if (p.v.bias != nullptr) y = __fadd_rn(y, load_float(p.v.bias, p.v.bias_dtype, channel));
  const int64_t query_head =
      static_cast<int64_t>(tile.head) * (args.head_rows / q_len) + row / q_len;
  const int64_t at =
      ((static_cast<int64_t>(tile.batch) * q_len + row % q_len) * p.heads + query_head) * head_dim +
      element + e;
  const int2 seen = tokens_seen(p, tokens, row % q_len);
  store_float(p.out, p.q_dtype, at, seen.x < seen.y ? y : 0.0F);
}

__global__ void __launch_bounds__(kProjectThreads, 1)
    project_kernel(const __grid_constant__ CombineArgs args) {
  ptx::grid_dependency_wait();
  const RowTile tile(args, static_cast<int32_t>(blockIdx.x));
  const int32_t element =
      (tile.part * (kProjectThreads / 32) + static_cast<int32_t>(threadIdx.x) / 32) *
      kProjectElements;
  if (element >= args.p.head_dim) return;
  const float* means[kProjectRows];
#pragma unroll
  for (int32_t r = 0; r < kProjectRows; ++r) {
    means[r] =
        args.folded + (static_cast<int64_t>(tile.batch_group(args)) * args.partials.group_rows +
                       tile.group_row(args, r)) *
                          args.partials.columns;
  }
  project_rows(args, tile, element, means);
}

}  // namespace int8_ops::cuda::attention
