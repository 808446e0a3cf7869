// Scores of the general path: keys of a warp's tokens, rotated, against some query rows. See
// Note [General path] in general_args.cuh.
#pragma once

#include <cstdint>

#include "../ptx/mma_s8.cuh"
#include "general_args.cuh"
#include "general_stage.cuh"
#include "latent_bytes.cuh"

namespace int8_ops::cuda::attention {

// A lane's part of one step of 32 tokens: of tokens 16 m + 8 h + lane / 4, words of 16 bytes.
using StepLatents = uint32_t[2][2][4];

// Where a lane's four tokens lie in a slice; tokens past the last one repeat it.
struct TokenRows {
  const int8_t* base;  // token 0 of the split
  int64_t stride;
  int32_t token;  // the lane's first one
  int32_t last;

  __device__ __forceinline__ const int8_t* at(int32_t m, int32_t h) const {
    return base + min(token + 16 * m + 8 * h, last) * stride;
  }
};

__device__ __forceinline__ void load_step(const GeneralArgs& args, const SplitPlace& place,
                                          const Step& step, StepLatents& words) {
  const LatentSlice& s = args.p.k.slices[step.slice];
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32;
  const TokenRows rows = {latents_at(s, place), s.q_token_stride, warp * kWarpTokens + lane / 4,
                          place.tokens - 1};
  const int32_t byte = step.byte + lane % 4 * 16;
  const int32_t valid = width_of(s) - byte;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      load_bytes(rows.at(m, h) + byte, valid, args.wide_k[step.slice], words[m][h]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (step.kind == StepKind::kLow) words[m][h][i] = low_int4(words[m][h][i]);
        if (step.kind == StepKind::kHigh) words[m][h][i] = high_int4(words[m][h][i]);
      }
    }
  }
}

// Adds a step's products to the sums of 32 tokens and 16 rows of A.
__device__ __forceinline__ void multiply_step(const StepLatents& words, const uint4 (&a)[2],
                                              int32_t (&sums)[2][2][4]) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const uint32_t low[4] = {words[m][0][0], words[m][1][0], words[m][0][1], words[m][1][1]};
    const uint32_t high[4] = {words[m][0][2], words[m][1][2], words[m][0][3], words[m][1][3]};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      ptx::mma_m16n8k32_s8(sums[m][half], low, a[half].x, a[half].y);
      ptx::mma_m16n8k32_s8(sums[m][half], high, a[half].z, a[half].w);
    }
  }
}

// Keys of one tile of pairs: element e of keys[m][half] is token 16 m + 8 (e / 2) + lane / 4, pair
// 2 (lane % 4) + e % 2.
using TileKeys = float[2][2][4];

// Sums of a slice, scaled by the token's and by A's scale, on top of the keys.
__device__ __forceinline__ void add_slice(const GeneralArgs& args, char* shared, int32_t slice,
                                          int32_t tile, int32_t (&sums)[2][2][4], TileKeys& keys) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32;
  const auto* a_scale = reinterpret_cast<const float*>(shared + args.shared.a_scale) +
                        (slice * args.panel_tiles + tile) * kTileRows + lane % 4 * 2;
  const auto* k_scale = reinterpret_cast<const float*>(shared + args.shared.k_scale) +
                        slice * kSplitTokens + warp * kWarpTokens + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 scale = *reinterpret_cast<const float2*>(a_scale + half * kTilePairs);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float sum = __fmul_rn(__int2float_rn(sums[m][half][e]), e % 2 ? scale.y : scale.x);
        keys[m][half][e] = fmaf(sum, k_scale[16 * m + e / 2 * 8], keys[m][half][e]);
        sums[m][half][e] = 0;
      }
    }
  }
}

// Turns the keys by their tokens' offsets and adds their products with the queries to the scores.
template <int kRows>
__device__ __forceinline__ void dot_keys(const GeneralArgs& args, char* shared, int32_t tile,
                                         TileKeys& keys, float (&scores)[kRows][4]) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32;
  const int32_t pairs = args.panel_tiles * kTilePairs;
  const int32_t pair = tile * kTilePairs + lane % 4 * 2;
  const auto* table = reinterpret_cast<const float2*>(shared + args.shared.table);
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const int32_t offset = 8 * t + lane / 4;
    const float4 turns =
        *reinterpret_cast<const float4*>(table + offset * (pairs + kTablePad) + pair);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float c = j ? turns.z : turns.x;
      const float s = j ? turns.w : turns.y;
      float& first = keys[t / 2][0][t % 2 * 2 + j];
      float& second = keys[t / 2][1][t % 2 * 2 + j];
      const float turned = fmaf(first, c, -__fmul_rn(second, s));
      second = fmaf(second, c, __fmul_rn(first, s));
      first = turned;
    }
  }
  const auto* queries =
      reinterpret_cast<const float2*>(shared + args.shared.queries) + warp * kRows * pairs + pair;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float4 q = *reinterpret_cast<const float4*>(queries + r * pairs);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int e = t % 2 * 2;
      float& score = scores[r][t];
      score = fmaf(q.x, keys[t / 2][0][e], score);
      score = fmaf(q.y, keys[t / 2][1][e], score);
      score = fmaf(q.z, keys[t / 2][0][e + 1], score);
      score = fmaf(q.w, keys[t / 2][1][e + 1], score);
    }
  }
}

// A lane's 16 bytes of a step of row `row` of the panel.
__device__ __forceinline__ uint4 a_operand(const GeneralArgs& args, const char* shared,
                                           const HeadPlace& head, int32_t first_tile, int32_t row,
                                           int32_t number, const Step& step) {
  const int32_t chunk = static_cast<int32_t>(threadIdx.x) % 4;
  if (args.a_in_shared) {
    return *reinterpret_cast<const uint4*>(shared + args.shared.a + row * args.pitch +
                                           number * kStepBytes + chunk * 16);
  }
  uint32_t words[4];
  load_a_chunk(args, head, first_tile, row, step, chunk, words);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Adds a panel's share to a warp's scores. kSteps > 0: the latents are in `held`.
template <int kRows, int kSteps>
__device__ __forceinline__ void score_panel(const GeneralArgs& args, char* shared,
                                            const HeadPlace& head, const SplitPlace& place,
                                            int32_t first_tile,
                                            const StepLatents (&held)[kSteps > 0 ? kSteps : 1],
                                            float (&scores)[kRows][4]) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const auto* bias = reinterpret_cast<const float*>(shared + args.shared.bias);
  const int32_t tiles = min(args.panel_tiles, args.tiles - first_tile);
  for (int32_t tile = 0; tile < tiles; ++tile) {
    TileKeys keys;
    int32_t sums[2][2][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 own = *reinterpret_cast<const float2*>(bias + tile * kTileRows +
                                                          half * kTilePairs + lane % 4 * 2);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) keys[m][half][e] = e % 2 ? own.y : own.x;
      }
    }
    StepWalk walk = {args.p.k};
    const int32_t row = tile * kTileRows + lane / 4;
    const auto take = [&](int32_t number, const StepLatents* latents) {
      const Step step = walk.next();
      const uint4 a[2] = {
          a_operand(args, shared, head, first_tile, row, number, step),
          a_operand(args, shared, head, first_tile, row + kTilePairs, number, step)};
      if (latents != nullptr) {
        multiply_step(*latents, a, sums);
      } else {
        StepLatents words;
        load_step(args, place, step, words);
        multiply_step(words, a, sums);
      }
      if (step.last) add_slice(args, shared, step.slice, tile, sums, keys);
    };
    if constexpr (kSteps > 0) {
#pragma unroll
      for (int number = 0; number < kSteps; ++number) {
        if (number < args.steps) take(number, &held[number]);
      }
    } else {
      for (int32_t number = 0; number < args.steps; ++number) take(number, nullptr);
    }
    dot_keys<kRows>(args, shared, tile, keys, scores);
  }
}

// Adds up what the lanes of a token have and writes the warp's scores.
template <int kRows>
__device__ __forceinline__ void store_scores(const GeneralArgs& args, char* shared,
                                             float (&scores)[kRows][4]) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  auto* to = reinterpret_cast<float*>(shared + args.shared.scores) +
             static_cast<int32_t>(threadIdx.x) / 32 * kWarpTokens + lane / 4;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      float y = scores[r][t];
      y = __fadd_rn(y, __shfl_xor_sync(~0u, y, 1));
      y = __fadd_rn(y, __shfl_xor_sync(~0u, y, 2));
      if (lane % 4 == 0) to[r * kSplitTokens + 8 * t] = y;
    }
  }
}

}  // namespace int8_ops::cuda::attention
