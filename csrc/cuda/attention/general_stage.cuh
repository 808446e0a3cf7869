// What a block of the general path brings to shared memory before it multiplies.
#pragma once

#include <cstdint>

#include "../epilogue/convert.cuh"
#include "../ptx/cp_async.cuh"
#include "../quantize/row_math.cuh"
#include "general_args.cuh"
#include "latent_bytes.cuh"
#include "rope.cuh"

namespace int8_ops::cuda::attention {

// Whom a block attends for.
struct HeadPlace {
  int32_t group;
  int32_t head;       // of all KV heads
  int32_t first_row;  // of the head's query rows
  int32_t rows;
};

// What it attends to.
struct SplitPlace {
  int32_t batch;
  int32_t group;
  int32_t split;
  int32_t begin;   // slot of the split's first token
  int32_t tokens;  // at least one
};

__device__ __forceinline__ const int8_t* latents_at(const LatentSlice& s, const SplitPlace& place) {
  return s.q + place.batch * s.q_batch_stride + place.group * s.q_group_stride +
         place.begin * s.q_token_stride;
}
__device__ __forceinline__ const float* scales_at(const LatentSlice& s, const SplitPlace& place) {
  return s.scale + place.batch * s.scale_batch_stride + place.group * s.scale_group_stride +
         place.begin;
}

// Where 16 bytes of A for a step lie, of row `row` of the panel that begins with tile `first_tile`,
// and how many of them are there: none, or fewer, where head or rank end.
struct AChunk {
  const int8_t* from;
  int32_t valid;

  __device__ __forceinline__ AChunk(const GeneralArgs& args, const HeadPlace& head,
                                    int32_t first_tile, int32_t row, const Step& step,
                                    int32_t chunk) {
    const LatentSlice& s = args.p.k.slices[step.slice];
    const auto half_dim = static_cast<int32_t>(args.p.head_dim / 2);
    const int32_t pair = (first_tile + row / kTileRows) * kTilePairs + row % kTilePairs;
    const int64_t channel = static_cast<int64_t>(head.head) * args.p.head_dim + pair +
                            (row % kTileRows < kTilePairs ? 0 : half_dim);
    const int32_t byte = step.byte + chunk * 16;
    valid = pair < half_dim ? width_of(s) - byte : 0;
    from = s.a;
    if (valid > 0) {
      from += channel * s.rank + byte + (step.kind == StepKind::kHigh ? width_of(s) : 0);
    }
  }
};

// A, its scales, the bias and the turns of the tokens' offsets, for the pairs of a panel.
__device__ __forceinline__ void stage_panel(const GeneralArgs& args, char* shared,
                                            const HeadPlace& head, int32_t first_tile) {
  const int32_t rows = args.panel_tiles * kTileRows;
  const int32_t pairs = args.panel_tiles * kTilePairs;
  const auto half_dim = static_cast<int32_t>(args.p.head_dim / 2);
  if (args.a_in_shared) {
    StepWalk walk = {args.p.k};
    for (int32_t number = 0; number < args.steps; ++number) {
      const Step step = walk.next();
      for (int32_t i = static_cast<int32_t>(threadIdx.x); i < rows * 4; i += kThreads) {
        const AChunk chunk(args, head, first_tile, i / 4, step, i % 4);
        char* to = shared + args.shared.a + i / 4 * args.pitch + number * kStepBytes + i % 4 * 16;
        if (args.wide_a[step.slice]) {
          ptx::cp_async_16(ptx::shared_address(to), chunk.from, chunk.valid > 0 ? 16 : 0);
        } else {
          uint32_t words[4];
          load_bytes(chunk.from, chunk.valid, false, words);
          *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
    }
    ptx::cp_async_commit_group();
  }
  auto* a_scale = reinterpret_cast<float*>(shared + args.shared.a_scale);
  auto* bias = reinterpret_cast<float*>(shared + args.shared.bias);
  for (int32_t row = static_cast<int32_t>(threadIdx.x); row < rows; row += kThreads) {
    const int32_t pair = (first_tile + row / kTileRows) * kTilePairs + row % kTilePairs;
    const bool there = pair < half_dim;
    const int64_t channel = static_cast<int64_t>(head.head) * args.p.head_dim + pair +
                            (row % kTileRows < kTilePairs ? 0 : half_dim);
    for (int32_t n = 0; n < args.p.k.count; ++n) {
      a_scale[n * rows + row] = there ? __ldg(args.p.k.slices[n].a_scale + channel) : 0.0F;
    }
    bias[row] = there && args.p.k.bias != nullptr
                    ? load_float(args.p.k.bias, args.p.k.bias_dtype, channel)
                    : 0.0F;
  }
  auto* table = reinterpret_cast<float2*>(shared + args.shared.table);
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kWarpTokens * pairs; i += kThreads) {
    const int32_t offset = i / pairs;
    const int32_t pair = first_tile * kTilePairs + i % pairs;
    table[offset * (pairs + kTablePad) + i % pairs] =
        pair < half_dim ? rotation(offset, __ldg(args.p.inv_freq + pair)) : make_float2(0.0F, 0.0F);
  }
}

// Where the block's query rows lie.
__device__ __forceinline__ void find_queries(const GeneralArgs& args, char* shared,
                                             const HeadPlace& head) {
  const auto r = static_cast<int32_t>(threadIdx.x);
  if (r >= head.rows) return;
  const auto q_len = static_cast<int32_t>(args.p.q_len);
  const int32_t row = head.first_row + r;
  const int64_t query_head = static_cast<int64_t>(head.head) * args.repeats + row / q_len;
  reinterpret_cast<int64_t*>(shared + args.shared.q_rows)[r] =
      query_head * args.p.q_head_stride + row % q_len * args.p.q_token_stride;
}

// A panel's pairs of the queries, scaled: [rows][2][pairs], zeros past the head's last pair.
template <int kRows, typename T>
__device__ __forceinline__ void copy_queries(const GeneralArgs& args, char* shared,
                                             const HeadPlace& head, const T* q,
                                             int32_t first_pair) {
  const int32_t pairs = args.panel_tiles * kTilePairs;
  const auto half_dim = static_cast<int32_t>(args.p.head_dim / 2);
  const float scaling = __fmul_rn(args.p.scaling, kLog2E);
  const auto* q_rows = reinterpret_cast<const int64_t*>(shared + args.shared.q_rows);
  auto* to = reinterpret_cast<float*>(shared + args.shared.plain);
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < 2 * pairs; i += kThreads) {
    const int32_t pair = first_pair + (i < pairs ? i : i - pairs);
    const int32_t channel = pair + (i < pairs ? 0 : half_dim);
    T values[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (pair < half_dim && r < head.rows) values[r] = q[q_rows[r] + channel];
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      to[r * 2 * pairs + i] = __fmul_rn(as_float(values[r]), scaling);
    }
  }
}

// The queries of a panel's pairs, for each warp turned back by its first token's angle.
template <int kRows>
__device__ __forceinline__ void stage_queries(const GeneralArgs& args, char* shared,
                                              const HeadPlace& head, const SplitPlace& place,
                                              int32_t position, int32_t first_tile) {
  const LatentAttentionParams& p = args.p;
  const int32_t pairs = args.panel_tiles * kTilePairs;
  const int32_t first_pair = first_tile * kTilePairs;
  const int64_t at = place.batch * p.q_batch_stride;
  switch (p.q_dtype) {
    case DType::kFloat16:
      copy_queries<kRows>(args, shared, head, static_cast<const __half*>(p.q) + at, first_pair);
      break;
    case DType::kBFloat16:
      copy_queries<kRows>(args, shared, head, static_cast<const __nv_bfloat16*>(p.q) + at,
                          first_pair);
      break;
    default:
      copy_queries<kRows>(args, shared, head, static_cast<const float*>(p.q) + at, first_pair);
  }
  __syncthreads();
  const auto* plain = reinterpret_cast<const float*>(shared + args.shared.plain);
  auto* queries = reinterpret_cast<float2*>(shared + args.shared.queries);
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kWarps * pairs; i += kThreads) {
    const int32_t warp = i / pairs;
    const int32_t own = i % pairs;
    float2 turn = make_float2(0.0F, 0.0F);
    if (first_pair + own < p.head_dim / 2) {
      turn = rotation(position + warp * kWarpTokens, __ldg(p.inv_freq + first_pair + own));
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float first = plain[r * 2 * pairs + own];
      const float second = plain[r * 2 * pairs + pairs + own];
      queries[(warp * kRows + r) * pairs + own] =
          make_float2(fmaf(second, turn.y, __fmul_rn(first, turn.x)),
                      fmaf(second, turn.x, -__fmul_rn(first, turn.y)));
    }
  }
}

// The keys' scales of a split's tokens, zeros past the last one.
__device__ __forceinline__ void stage_scales(const GeneralArgs& args, char* shared,
                                             const SplitPlace& place) {
  const int32_t t = static_cast<int32_t>(threadIdx.x);
  auto* to = reinterpret_cast<float*>(shared + args.shared.k_scale) + t;
  for (int32_t n = 0; n < args.p.k.count; ++n) {
    to[n * kSplitTokens] =
        t < place.tokens ? __ldg(scales_at(args.p.k.slices[n], place) + t) : 0.0F;
  }
}

}  // namespace int8_ops::cuda::attention
