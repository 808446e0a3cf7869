// Weights of the general path, and weights times the values' latents.
#pragma once

#include <cstdint>

#include "../ptx/max_nan.cuh"
#include "general_args.cuh"
#include "general_stage.cuh"
#include "latent_bytes.cuh"

namespace int8_ops::cuda::attention {

// Scores -> exponentials against the row's largest, 0 for tokens that it doesn't see; a warp a row.
template <int kRows>
__device__ __forceinline__ void weigh_rows(const GeneralArgs& args, char* shared,
                                           const HeadPlace& head, const SplitPlace& place,
                                           const DecodeRow& row_tokens, float2* stats) {
  constexpr int kEach = kSplitTokens / 32;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  for (int32_t r = static_cast<int32_t>(threadIdx.x) / 32; r < head.rows; r += kWarps) {
    auto* scores = reinterpret_cast<float*>(shared + args.shared.scores) + r * kSplitTokens + lane;
    const int32_t query = (head.first_row + r) % static_cast<int32_t>(args.p.q_len);
    int2 seen = tokens_seen(args.p, row_tokens, query);
    seen.x = max(seen.x - place.begin, 0);
    seen.y = min(seen.y - place.begin, place.tokens);
    float own[kEach];
    float most = -INFINITY;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int32_t t = 32 * i + lane;
      own[i] = t >= seen.x && t < seen.y ? scores[32 * i] : -INFINITY;
      most = ptx::max_nan_f32(most, own[i]);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      most = ptx::max_nan_f32(most, __shfl_xor_sync(~0u, most, step));
    }
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int32_t t = 32 * i + lane;
      const float weight = t >= seen.x && t < seen.y ? exp2f(own[i] - most) : 0.0F;
      scores[32 * i] = weight;
      sum = __fadd_rn(sum, weight);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, step));
    }
    if (lane == 0) {
      reinterpret_cast<int2*>(shared + args.shared.seen)[r] = seen;
      // -inf says that nothing is seen: scores of -inf alone are as good as NaN.
      if (seen.x < seen.y && most == -INFINITY) most = NAN;
      stats[r] = make_float2(most, sum);
    }
  }
}

// Weights times the tokens' scales of a slice, a token a thread; what is not seen may be NaN.
template <int kRows>
__device__ __forceinline__ void scale_weights(const GeneralArgs& args, char* shared,
                                              const HeadPlace& head, const SplitPlace& place,
                                              const LatentSlice& slice) {
  const auto t = static_cast<int32_t>(threadIdx.x);
  const float scale = t < place.tokens ? __ldg(scales_at(slice, place) + t) : 0.0F;
  const auto* scores = reinterpret_cast<const float*>(shared + args.shared.scores) + t;
  const auto* all_seen = reinterpret_cast<const int2*>(shared + args.shared.seen);
  auto* weights = reinterpret_cast<float*>(shared + args.shared.weights) + t * kRows;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float weight = 0.0F;
    if (r < head.rows) {
      const int2 seen = all_seen[r];
      if (t >= seen.x && t < seen.y) weight = __fmul_rn(scores[r * kSplitTokens], scale);
    }
    weights[r] = weight;
  }
}

// The rows' weights of a token; they are neighbours, and as aligned as they are many.
template <int kRows>
__device__ __forceinline__ void load_weights(const float* from, float (&weights)[kRows]) {
  if constexpr (kRows % 4 == 0) {
#pragma unroll
    for (int r = 0; r < kRows; r += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + r);
      weights[r] = four.x, weights[r + 1] = four.y, weights[r + 2] = four.z,
      weights[r + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r) weights[r] = from[r];
  }
}

// Where a thread reads four columns of some tokens.
struct Columns {
  const int8_t* from;
  int64_t stride;
  int32_t valid;  // bytes
  StepKind kind;
};

// Four columns of `count` tokens: weights times latents.
template <int kRows, bool kWide>
__device__ __forceinline__ void sum_tokens(Columns columns, int32_t count, const float* weights,
                                           float (&sums)[kRows][4]) {
  constexpr int kAhead = 4;
  uint32_t next[kAhead][1];
  const auto load = [&](int32_t first) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      load_bytes(columns.from + i * columns.stride, first + i < count ? columns.valid : 0, kWide,
                 next[i]);
    }
    columns.from += kAhead * columns.stride;
  };
  load(0);
  for (int32_t first = 0; first < count; first += kAhead) {
    uint32_t words[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) words[i] = next[i][0];
    load(first + kAhead);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= count) break;
      uint32_t word = words[i];
      if (columns.kind != StepKind::kInt8) {
        word = columns.kind == StepKind::kHigh ? high_int4(word) : low_int4(word);
      }
      float own[kRows];
      load_weights(weights + (first + i) * kRows, own);
      float latent[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        latent[j] = static_cast<float>(static_cast<int8_t>(word >> (8 * j)));
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[r][j] = fmaf(own[r], latent[j], sums[r][j]);
      }
    }
  }
}

// A slice's weighted sums, to the partial results of the block's rows. Threads take four columns
// each, and where there are few, groups of threads share the tokens: how depends on the rank alone.
template <int kRows>
__device__ __forceinline__ void sum_slice(const GeneralArgs& args, char* shared,
                                          const HeadPlace& head, const SplitPlace& place, int32_t n,
                                          float* out) {
  const LatentSlice& s = args.p.v.slices[n];
  const int32_t tid = static_cast<int32_t>(threadIdx.x);
  const int32_t half_units = (width_of(s) + 3) / 4;
  const int32_t units = half_units * (s.packed ? 2 : 1);
  int32_t across = 1;
  while (across < units && across < kThreads) across *= 2;
  const int32_t share = across;  // tokens a group: kSplitTokens / (kThreads / across)
  const int32_t begin = tid / across * share;
  auto* shares = reinterpret_cast<float4*>(shared + args.shared.queries);
  for (int32_t first = 0; first < units; first += across) {
    const int32_t unit = first + tid % across;
    const bool high = unit >= half_units;
    const int32_t byte = (high ? unit - half_units : unit) * 4;
    float sums[kRows][4] = {};
    if (unit < units) {
      const auto* weights =
          reinterpret_cast<const float*>(shared + args.shared.weights) + begin * kRows;
      const Columns columns = {latents_at(s, place) + begin * s.q_token_stride + byte,
                               s.q_token_stride, width_of(s) - byte,
                               !s.packed ? StepKind::kInt8
                               : high    ? StepKind::kHigh
                                         : StepKind::kLow};
      const int32_t count = min(share, place.tokens - begin);
      args.wide_v[n] ? sum_tokens<kRows, true>(columns, count, weights, sums)
                     : sum_tokens<kRows, false>(columns, count, weights, sums);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      shares[r * kThreads + tid] = make_float4(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
    }
    __syncthreads();
    for (int32_t i = tid; i < head.rows * across; i += kThreads) {
      const int32_t r = i / across;
      const int32_t own = first + i % across;
      const int2 seen = reinterpret_cast<const int2*>(shared + args.shared.seen)[r];
      if (own >= units || seen.x >= seen.y) continue;
      const float4* from = shares + r * kThreads + i % across;
      float4 sum = from[0];
      for (int32_t group = across; group < kThreads; group += across) {
        const float4 more = from[group];
        sum = make_float4(__fadd_rn(sum.x, more.x), __fadd_rn(sum.y, more.y),
                          __fadd_rn(sum.z, more.z), __fadd_rn(sum.w, more.w));
      }
      const bool own_high = own >= half_units;
      const int32_t column = (own_high ? own - half_units : own) * 4;
      float* to = out + static_cast<int64_t>(r) * args.partials.columns + column +
                  (own_high ? width_of(s) : 0);
      const float values[4] = {sum.x, sum.y, sum.z, sum.w};
      // Packed halves may meet at any column; otherwise the padding gets the zeros that it sums to.
      const int32_t valid = s.packed ? min(4, width_of(s) - column) : 4;
      for (int32_t j = 0; j < valid; ++j) to[j] = values[j];
    }
    __syncthreads();
  }
}

}  // namespace int8_ops::cuda::attention
