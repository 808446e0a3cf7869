// The values' A times what queries have summed up of latents.
#pragma once

#include <cstdint>

#include "../epilogue/convert.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/load_global.cuh"
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
    part = args.by_parts.remainder(block);
    block = args.by_parts.quotient(block);
    first_row = args.by_row_tiles.remainder(block) * kProjectRows;
    block = args.by_row_tiles.quotient(block);
    head = args.by_kv_heads.remainder(block);
    batch = args.by_kv_heads.quotient(block);
  }

  // Rows past the last one repeat it.
  __device__ __forceinline__ int32_t row(const CombineArgs& args, int32_t r) const {
    return min(first_row + r, args.head_rows - 1);
  }
  __device__ __forceinline__ int32_t batch_group(const CombineArgs& args) const {
    return batch * static_cast<int32_t>(args.p.groups) + args.by_group_heads.quotient(head);
  }
  // The row's number within its group.
  __device__ __forceinline__ int32_t group_row(const CombineArgs& args, int32_t r) const {
    return args.by_group_heads.remainder(head) * args.head_rows + row(args, r);
  }
};

// Four values of a row of A from `column` on, zeros past its end.
template <bool kVector>
__device__ __forceinline__ uint32_t load_a(const int8_t* row, int32_t column, int32_t rank) {
  if constexpr (kVector) return __ldg(reinterpret_cast<const uint32_t*>(row + column));
  uint32_t word = 0;
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    if (column + i < rank) {
      word |= static_cast<uint32_t>(static_cast<uint8_t>(__ldg(row + column + i))) << (8 * i);
    }
  }
  return word;
}

using ElementSums = float[kProjectElements][kProjectRows];

// A lane's share of a slice's products. Rows of which nothing is seen have means of 0.
template <bool kVector>
__device__ __forceinline__ void add_products(const int8_t* a, int32_t rank, int32_t first_column,
                                             const float* const (&means)[kProjectRows],
                                             ElementSums& sums) {
#pragma unroll 2
  for (int32_t column = static_cast<int32_t>(threadIdx.x) % 32 * 4; column < rank; column += 128) {
    uint32_t words[kProjectElements];
#pragma unroll
    for (int32_t e = 0; e < kProjectElements; ++e) {
      words[e] = load_a<kVector>(a + static_cast<int64_t>(e) * rank, column, rank);
    }
    float4 x[kProjectRows];
#pragma unroll
    for (int32_t r = 0; r < kProjectRows; ++r) {
      x[r] = *reinterpret_cast<const float4*>(means[r] + first_column + column);
      if constexpr (kVector) continue;
      // Columns are padded to fours, and what the padding holds is not to be multiplied.
      if (column + 1 >= rank) x[r].y = 0.0F;
      if (column + 2 >= rank) x[r].z = 0.0F;
      if (column + 3 >= rank) x[r].w = 0.0F;
    }
#pragma unroll
    for (int32_t e = 0; e < kProjectElements; ++e) {
      float y[4];
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        y[i] = static_cast<float>(static_cast<int8_t>(words[e] >> (8 * i)));
      }
#pragma unroll
      for (int32_t r = 0; r < kProjectRows; ++r) {
        sums[e][r] = fmaf(y[0], x[r].x, sums[e][r]);
        sums[e][r] = fmaf(y[1], x[r].y, sums[e][r]);
        sums[e][r] = fmaf(y[2], x[r].z, sums[e][r]);
        sums[e][r] = fmaf(y[3], x[r].w, sums[e][r]);
      }
    }
  }
}

// A warp makes kProjectElements elements of kProjectRows query rows of a head, from the rows'
// means; its lanes share the columns, four at a time.
__device__ __forceinline__ void project_rows(const CombineArgs& args, const RowTile& tile,
                                             const DecodeRow& tokens, int32_t element,
                                             const float* const (&means)[kProjectRows]) {
  const LatentAttentionParams& p = args.p;
  const auto q_len = static_cast<int32_t>(p.q_len);
  const auto head_dim = static_cast<int32_t>(p.head_dim);
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  ElementSums sum = {};
  for (int32_t n = 0; n < p.v.count; ++n) {
    const LatentSlice& s = p.v.slices[n];
    const auto rank = static_cast<int32_t>(s.rank);
    const int64_t a_row = static_cast<int64_t>(tile.head) * head_dim + element;
    const float scale[kProjectElements] = {__ldg(s.a_scale + a_row), __ldg(s.a_scale + a_row + 1)};
    ElementSums own = {};
    if (args.vector_a[n]) {
      add_products<true>(s.a + a_row * rank, rank, args.partials.column_of[n], means, own);
    } else {
      add_products<false>(s.a + a_row * rank, rank, args.partials.column_of[n], means, own);
    }
#pragma unroll
    for (int32_t e = 0; e < kProjectElements; ++e) {
#pragma unroll
      for (int32_t r = 0; r < kProjectRows; ++r) sum[e][r] = fmaf(own[e][r], scale[e], sum[e][r]);
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
  // Query heads of a KV head follow one another, as do its rows without the new tokens' number.
  const int32_t new_token = args.by_q_len.remainder(row);
  const int64_t query_head = args.by_q_len.quotient(tile.head * args.head_rows + row);
  const int64_t at =
      ((static_cast<int64_t>(tile.batch) * q_len + new_token) * p.heads + query_head) * head_dim +
      element + e;
  const int2 seen = tokens_seen(p, tokens, new_token);
  store_float(p.out, p.q_dtype, at, seen.x < seen.y ? y : 0.0F);
}

// The rows of A that a block applies, to L2: they are not made by a kernel before this one's, so
// that they can be on their way while it is waited for.
template <int32_t kWarpsOfBlock>
__device__ __forceinline__ void prefetch_a(const CombineArgs& args, const RowTile& tile) {
#if __CUDA_ARCH__ >= 900  // elsewhere no kernel waits for another
  constexpr int32_t kLineBytes = 128;
  const int32_t element = tile.part * kWarpsOfBlock * kProjectElements;
  const int32_t elements =
      min(kWarpsOfBlock * kProjectElements, static_cast<int32_t>(args.p.head_dim) - element);
  const int64_t row = static_cast<int64_t>(tile.head) * args.p.head_dim + element;
  for (int32_t n = 0; n < args.p.v.count; ++n) {
    const LatentSlice& s = args.p.v.slices[n];
    const auto bytes = static_cast<int32_t>(elements * s.rank);
    for (int32_t i = static_cast<int32_t>(threadIdx.x) * kLineBytes; i < bytes;
         i += kWarpsOfBlock * 32 * kLineBytes) {
      ptx::prefetch_global_l2(s.a + row * s.rank + i);
    }
    if (threadIdx.x == 0) ptx::prefetch_global_l2(s.a_scale + row);
  }
#endif
}

// A block's part of the head: its warps take turns.
template <int32_t kWarpsOfBlock>
__device__ __forceinline__ void project_part(const CombineArgs& args, const RowTile& tile,
                                             const DecodeRow& tokens,
                                             const float* const (&means)[kProjectRows]) {
  const int32_t warp = tile.part * kWarpsOfBlock + static_cast<int32_t>(threadIdx.x) / 32;
  const int32_t step = args.parts * kWarpsOfBlock * kProjectElements;
  for (int32_t e = warp * kProjectElements; e < args.p.head_dim; e += step) {
    project_rows(args, tile, tokens, e, means);
  }
}

__global__ void __launch_bounds__(kProjectThreads)
    project_kernel(const __grid_constant__ CombineArgs args) {
  const RowTile tile(args, static_cast<int32_t>(blockIdx.x));
  prefetch_a<kProjectThreads / 32>(args, tile);
  const DecodeRow tokens = decode_row(args.p, tile.batch);
  ptx::grid_dependency_wait();
  const float* means[kProjectRows];
#pragma unroll
  for (int32_t r = 0; r < kProjectRows; ++r) {
    means[r] =
        args.folded + (static_cast<int64_t>(tile.batch_group(args)) * args.partials.group_rows +
                       tile.group_row(args, r)) *
                          args.partials.columns;
  }
  project_part<kProjectThreads / 32>(args, tile, tokens, means);
  ptx::grid_dependency_trigger();
}

}  // namespace int8_ops::cuda::attention
