// Scores of the general path: keys of a warp's tokens, rotated, against some query rows. See
// Note [General path] in general_args.cuh.
#pragma once

#include <cstdint>

#include "../ptx/mma_s8.cuh"
#include "general_args.cuh"
#include "general_stage.cuh"
#include "latent_bytes.cuh"

namespace int8_ops::cuda::attention {

// A lane's part of one step of 16 tokens: of tokens lane / 4 and eight further, words of 16 bytes.
using StepLatents = uint32_t[2][4];

// The 16 tokens that a warp is at: the first one's number within the split.
__device__ __forceinline__ int32_t first_token(int32_t pass) {
  return static_cast<int32_t>(threadIdx.x) / 32 * kWarpTokens + pass * 16;
}

// Where a lane's two tokens lie in a slice; tokens past the last one repeat it.
struct TokenRows {
  const int8_t* from[2];

  __device__ __forceinline__ TokenRows(const LatentSlice& s, const SplitPlace& place,
                                       int32_t pass) {
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t token = min(first_token(pass) + 8 * h + lane / 4, place.tokens - 1);
      from[h] = latents_at(s, place) + token * s.q_token_stride + lane % 4 * 16;
    }
  }
  __device__ __forceinline__ void load(int32_t byte, int32_t width, bool wide,
                                       StepLatents& words) const {
    const int32_t valid = width - byte - static_cast<int32_t>(threadIdx.x) % 4 * 16;
#pragma unroll
    for (int h = 0; h < 2; ++h) load_bytes(from[h] + byte, valid, wide, words[h]);
  }
};

__device__ __forceinline__ void unpack(StepKind kind, const StepLatents& bytes,
                                       StepLatents& words) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = bytes[h][i];
      words[h][i] = kind == StepKind::kInt8  ? word
                    : kind == StepKind::kLow ? low_int4(word)
                                             : high_int4(word);
    }
  }
}

// Adds a step's products to the sums of 16 tokens and eight rows of A.
__device__ __forceinline__ void multiply_step(const StepLatents& words, const uint4& a,
                                              int32_t (&sums)[4]) {
  const uint32_t low[4] = {words[0][0], words[1][0], words[0][1], words[1][1]};
  const uint32_t high[4] = {words[0][2], words[1][2], words[0][3], words[1][3]};
  ptx::mma_m16n8k32_s8(sums, low, a.x, a.y);
  ptx::mma_m16n8k32_s8(sums, high, a.z, a.w);
}

// Of one tile of pairs, element e of [half] is token 8 (e / 2) + lane / 4, pair 2 (lane % 4) + e
// % 2.
using TileSums = int32_t[2][4];
using TileKeys = float[2][4];

__device__ __forceinline__ void start_keys(const GeneralArgs& args, const char* shared,
                                           int32_t tile, TileSums& sums, TileKeys& keys) {
  const auto* bias = reinterpret_cast<const float*>(shared + args.shared.bias) + tile * kTileRows +
                     static_cast<int32_t>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 own = *reinterpret_cast<const float2*>(bias + half * kTilePairs);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      keys[half][e] = e % 2 ? own.y : own.x;
      sums[half][e] = 0;
    }
  }
}

// Sums of a slice, scaled by the token's and by A's scale, on top of the keys.
__device__ __forceinline__ void add_slice(const GeneralArgs& args, const char* shared,
                                          int32_t slice, int32_t tile, int32_t pass, TileSums& sums,
                                          TileKeys& keys) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const auto* a_scale = reinterpret_cast<const float*>(shared + args.shared.a_scale) +
                        (slice * args.panel_tiles + tile) * kTileRows + lane % 4 * 2;
  const auto* k_scale = reinterpret_cast<const float*>(shared + args.shared.k_scale) +
                        slice * kSplitTokens + first_token(pass) + lane / 4;
  const float token_scale[2] = {k_scale[0], k_scale[8]};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 scale = *reinterpret_cast<const float2*>(a_scale + half * kTilePairs);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float sum = __fmul_rn(__int2float_rn(sums[half][e]), e % 2 ? scale.y : scale.x);
      keys[half][e] = fmaf(sum, token_scale[e / 2], keys[half][e]);
      sums[half][e] = 0;
    }
  }
}

// Turns the keys by their tokens' offsets and adds their products with the queries to the scores of
// the lane's two tokens.
template <int kRows>
__device__ __forceinline__ void dot_keys(const GeneralArgs& args, const char* shared, int32_t tile,
                                         int32_t pass, TileKeys& keys, float (&scores)[kRows][2]) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32;
  const int32_t pairs = args.panel_tiles * kTilePairs;
  const int32_t pair = tile * kTilePairs + lane % 4 * 2;
  const auto* table = reinterpret_cast<const float2*>(shared + args.shared.table) +
                      (16 * pass + lane / 4) * (pairs + kTablePad) + pair;
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    const float4 turns = *reinterpret_cast<const float4*>(table + 8 * t * (pairs + kTablePad));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float c = j ? turns.z : turns.x;
      const float s = j ? turns.w : turns.y;
      float& first = keys[0][2 * t + j];
      float& second = keys[1][2 * t + j];
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
    for (int t = 0; t < 2; ++t) {
      float& score = scores[r][t];
      score = fmaf(q.x, keys[0][2 * t], score);
      score = fmaf(q.y, keys[1][2 * t], score);
      score = fmaf(q.z, keys[0][2 * t + 1], score);
      score = fmaf(q.w, keys[1][2 * t + 1], score);
    }
  }
}

// A lane's 16 bytes of step `number` of row `row` of the panel, in shared memory.
__device__ __forceinline__ uint4 a_operand(const GeneralArgs& args, const char* shared, int32_t row,
                                           int32_t number) {
  return *reinterpret_cast<const uint4*>(shared + args.shared.a + row * args.pitch +
                                         number * kStepBytes +
                                         static_cast<int32_t>(threadIdx.x) % 4 * 16);
}

// A panel's share of the scores of 16 tokens, whose latents stay in registers.
template <int kRows>
__device__ __forceinline__ void score_held(const GeneralArgs& args, const char* shared,
                                           const SplitPlace& place, int32_t tiles, int32_t pass,
                                           float (&scores)[kRows][2]) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  StepLatents held[kHeldSteps];
  // Without a branch between them the loads are all under way at once.
#pragma unroll
  for (int i = 0; i < kHeldSteps; ++i) {
    if (i >= args.steps) break;
    const LatentSlice& s = args.p.k.slices[args.held[i].slice];
    TokenRows(s, place, pass).load(args.held[i].byte, width_of(s), true, held[i]);
  }
#pragma unroll
  for (int i = 0; i < kHeldSteps; ++i) {
    if (i < args.steps) unpack(args.held[i].kind, held[i], held[i]);
  }
  for (int32_t tile = 0; tile < tiles; ++tile) {
    TileSums sums;
    TileKeys keys;
    start_keys(args, shared, tile, sums, keys);
    const int32_t row = tile * kTileRows + lane / 4;
#pragma unroll
    for (int i = 0; i < kHeldSteps; ++i) {
      if (i >= args.steps) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        multiply_step(held[i], a_operand(args, shared, row + half * kTilePairs, i), sums[half]);
      }
      if (args.held[i].last) add_slice(args, shared, args.held[i].slice, tile, pass, sums, keys);
    }
    dot_keys<kRows>(args, shared, tile, pass, keys, scores);
  }
}

// The same with latents that are read again for each kAtOnce tiles.
template <int kRows>
__device__ __forceinline__ void score_streamed(const GeneralArgs& args, const char* shared,
                                               const HeadPlace& head, const SplitPlace& place,
                                               int32_t first_tile, int32_t tiles, int32_t pass,
                                               float (&scores)[kRows][2]) {
  constexpr int32_t kAtOnce = 2;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  for (int32_t tile = 0; tile < tiles; tile += kAtOnce) {
    TileSums sums[kAtOnce];
    TileKeys keys[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      start_keys(args, shared, min(tile + i, tiles - 1), sums[i], keys[i]);
    }
    int32_t number = 0;
    const auto multiply = [&](const Step& step, const StepLatents& bytes) {
      StepLatents words;
      unpack(step.kind, bytes, words);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int32_t row = min(tile + i, tiles - 1) * kTileRows + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint4 a;
          if (args.a_in_shared) {
            a = a_operand(args, shared, row + half * kTilePairs, number);
          } else {
            uint32_t chunk[4];
            const AChunk place_of(args, head, first_tile, row + half * kTilePairs, step, lane % 4);
            load_bytes(place_of.from, place_of.valid, args.wide_a[step.slice], chunk);
            a = make_uint4(chunk[0], chunk[1], chunk[2], chunk[3]);
          }
          multiply_step(words, a, sums[i][half]);
        }
      }
      ++number;
    };
    for (int32_t n = 0; n < args.p.k.count; ++n) {
      const LatentSlice& s = args.p.k.slices[n];
      const TokenRows rows(s, place, pass);
      const int32_t width = width_of(s);
      const bool wide = args.wide_k[n];
      const bool packed = s.packed;
#pragma unroll 2
      for (int32_t byte = 0; byte < width; byte += kStepBytes) {
        StepLatents bytes;
        rows.load(byte, width, wide, bytes);
        if (packed) {
          multiply({n, byte, StepKind::kLow, false}, bytes);
          multiply({n, byte, StepKind::kHigh, false}, bytes);
        } else {
          multiply({n, byte, StepKind::kInt8, false}, bytes);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        add_slice(args, shared, n, min(tile + i, tiles - 1), pass, sums[i], keys[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (tile + i < tiles) dot_keys<kRows>(args, shared, tile + i, pass, keys[i], scores);
    }
  }
}

// Adds up what the lanes of a token have, and writes a panel's share of the scores or adds it.
template <int kRows>
__device__ __forceinline__ void store_scores(const GeneralArgs& args, char* shared, int32_t pass,
                                             bool add, float (&scores)[kRows][2]) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  auto* to = reinterpret_cast<float*>(shared + args.shared.scores) + first_token(pass) + lane / 4;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      float y = scores[r][t];
      y = __fadd_rn(y, __shfl_xor_sync(~0u, y, 1));
      y = __fadd_rn(y, __shfl_xor_sync(~0u, y, 2));
      float& score = to[r * kSplitTokens + 8 * t];
      if (lane % 4 == 0) score = add ? __fadd_rn(score, y) : y;
    }
  }
}

}  // namespace int8_ops::cuda::attention
