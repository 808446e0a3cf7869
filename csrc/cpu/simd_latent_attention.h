// latent_attention_decode, shared by the instruction sets: V is the vector-ops struct of one of
// them. See simd_matmul.h for the rules of such a header, and latent_attention_plan.h for how a
// call is cut.
//
// A split of one group's tokens, in three steps over buffers that stay in the cache:
//   scores   simd_latent_scores.h
//   weights  exponentials against the split's own maximum
//   sums     weights times the values' latents, each latent converted once for a block of rows
#pragma once

#include <cstdint>
#include <cstring>

#include "simd_latent_scores.h"

namespace int8_ops::cpu {
namespace {

constexpr float kNoScore = -__builtin_inff();

// exp(x) for x <= 0 or NaN, to some 2 units in the last place; at least 2^-126.
template <typename V>
inline typename V::Float exponential(typename V::Float x) {
  using Float = typename V::Float;
  x = V::max(V::broadcast(-87.0F), x);
  const Float n = V::round(V::mul(x, V::broadcast(1.44269504F)));
  // ln 2 in two parts, the first of so few bits that n times it is exact.
  Float r = V::fma(n, V::broadcast(-0.693359375F), x);
  r = V::fma(n, V::broadcast(2.12194440e-4F), r);
  // Its Taylor series: |r| <= 0.35, so the first term left out is below 2^-27.
  Float y = V::broadcast(1.0F / 5040.0F);
  y = V::fma(y, r, V::broadcast(1.0F / 720.0F));
  y = V::fma(y, r, V::broadcast(1.0F / 120.0F));
  y = V::fma(y, r, V::broadcast(1.0F / 24.0F));
  y = V::fma(y, r, V::broadcast(1.0F / 6.0F));
  y = V::fma(y, r, V::broadcast(0.5F));
  y = V::fma(y, r, V::broadcast(1.0F));
  y = V::fma(y, r, V::broadcast(1.0F));
  return V::mul(y, V::power_of_two(n));
}

// The same of one number, with the same bits.
template <typename V>
inline float exponential_of(float x) {
  return V::first_lane(exponential<V>(V::broadcast(x)));
}

// ---- weights ----------------------------------------------------------------------------------

// Scores -> exponentials, 0 for tokens outside `seen`; maximum and sum to out[0] and out[1].
template <typename V>
void exponentials(Range seen, int64_t count, float* scores, float* out) {
  using Float = typename V::Float;
  const int64_t padded = round_up(count, V::kLanes);
  for (int64_t t = 0; t < seen.begin; ++t) scores[t] = kNoScore;
  for (int64_t t = seen.end; t < padded; ++t) scores[t] = kNoScore;
  Float most = V::broadcast(kNoScore);
  for (int64_t t = 0; t < padded; t += V::kLanes) {
    most = V::max(most, V::load_float32(scores + t));
  }
  alignas(64) float lanes[V::kLanes];
  V::store_float32(lanes, most);
  float largest = kNoScore;
  for (int i = 0; i < V::kLanes; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  Float sum = V::zero_float();
  for (int64_t t = 0; t < padded && seen.begin < seen.end; t += V::kLanes) {
    const Float y = exponential<V>(V::sub(V::load_float32(scores + t), V::broadcast(largest)));
    V::store_float32(scores + t, y);
  }
  for (int64_t t = 0; t < seen.begin; ++t) scores[t] = 0.0F;
  for (int64_t t = seen.end; t < padded; ++t) scores[t] = 0.0F;
  for (int64_t t = 0; t < padded; t += V::kLanes) sum = V::add(sum, V::load_float32(scores + t));
  out[0] = largest;
  out[1] = V::sum_of_lanes(sum);
}

// ---- sums -------------------------------------------------------------------------------------

// kRows rows of weights times kVecs vectors of every token's latent.
template <typename V, int kRows, int kVecs>
void mix_tile(const float* weights, LatentRows latents, int64_t count, float* out,
              int64_t out_stride) {
  using Float = typename V::Float;
  Float acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[i][v] = V::zero_float();
  }
  for (int64_t t = 0; t < count; ++t, latents.rows += latents.stride) {
    Float latent[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) latent[v] = V::load_int8(latents.rows + v * V::kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Float w = V::broadcast(weights[i * kSplitTokens + t]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[i][v] = V::fma(w, latent[v], acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      V::store_float32(out + i * out_stride + v * V::kLanes, acc[i][v]);
    }
  }
}

template <typename V, int kRows>
void mix_rows(int64_t rows, const float* weights, LatentRows latents, int64_t count,
              int64_t vectors, float* out, int64_t out_stride) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return mix_rows<V, kRows - 1>(rows, weights, latents, count, vectors, out, out_stride);
    }
  }
  int64_t v = 0;
  for (; v + V::kMixVectors <= vectors; v += V::kMixVectors) {
    mix_tile<V, kRows, V::kMixVectors>(weights, {latents.rows + v * V::kLanes, latents.stride},
                                       count, out + v * V::kLanes, out_stride);
  }
  for (; v < vectors; ++v) {
    mix_tile<V, kRows, 1>(weights, {latents.rows + v * V::kLanes, latents.stride}, count,
                          out + v * V::kLanes, out_stride);
  }
}

inline Range within(Range tokens, int64_t begin, int64_t count) {
  const int64_t low = tokens.begin > begin ? tokens.begin - begin : 0;
  const int64_t high = least(tokens.end - begin, count);
  return high > low ? Range{low, high} : Range{0, 0};
}

// Weights times token scales, 0 where the query doesn't see the token, whatever its scale is.
template <typename V>
void scale_weights(const float* weights, const float* scale, Range seen, int64_t count,
                   float* out) {
  for (int64_t t = 0; t < count; t += V::kLanes) {
    V::store_float32(out + t, V::mul(V::load_float32(weights + t), V::load_float32(scale + t)));
  }
  for (int64_t t = 0; t < seen.begin; ++t) out[t] = 0.0F;
  for (int64_t t = seen.end; t < count; ++t) out[t] = 0.0F;
}

template <typename V>
void attend_split(const LatentAttentionParams& p, const LatentAttentionPlan& plan, int64_t task,
                  char* scratch) {
  const DecodeTask what = decode_task(plan, p, task);
  const DecodeRow row = decode_row(p, what.batch);
  const int64_t begin = row.begin + (row.first_split + what.split) * kSplitTokens;
  if (begin >= row.end) return;
  const int64_t count = least(row.end - begin, kSplitTokens);
  auto* staged = reinterpret_cast<int8_t*>(scratch + plan.staged);
  float* token_scale = floats_at(scratch, plan.token_scale);
  float* scores = floats_at(scratch, plan.scores);

  char* slivers = scratch + plan.k_packed;
  for (int64_t n = 0; n < p.k.count; ++n) {
    const LatentSlice& s = p.k.slices[n];
    load_scales(s, what, begin, count, token_scale + n * kSplitTokens);
    pack_latents<V>(s, latent_rows(s, what, begin, count, 1, staged), count, plan.k_sliver_bytes[n],
                    slivers);
    slivers += kSplitTokens / V::kTileCols * plan.k_sliver_bytes[n];
  }
  const int64_t rows = (what.heads.end - what.heads.begin) * plan.head_rows;
  float* partial =
      partial_at(p, plan, what.batch, what.group, what.split, what.heads.begin * plan.head_rows);
  for (int64_t r = 0; r < rows; r += plan.head_rows) {
    const int64_t head = what.group * plan.group_heads + what.heads.begin + r / plan.head_rows;
    score_head<V>(p, plan, what, head, count, scratch, scores + r * kSplitTokens);
  }
  for (int64_t r = 0; r < rows; ++r) {
    exponentials<V>(within(tokens_seen(p, row, r % p.q_len), begin, count), count,
                    scores + r * kSplitTokens,
                    partial + r * plan.partial_floats + plan.sum_columns);
  }
  float* weights = floats_at(scratch, plan.weights);
  for (int64_t n = 0; n < p.v.count; ++n) {
    const LatentSlice& s = p.v.slices[n];
    load_scales(s, what, begin, count, token_scale);
    const LatentRows latents = latent_rows(s, what, begin, count, V::kLanes, staged);
    for (int64_t r = 0; r < rows; ++r) {
      scale_weights<V>(scores + r * kSplitTokens, token_scale,
                       within(tokens_seen(p, row, r % p.q_len), begin, count), count,
                       weights + r * kSplitTokens);
    }
    for (int64_t r = 0; r < rows; r += V::kMixRows) {
      mix_rows<V, V::kMixRows>(least(rows - r, V::kMixRows), weights + r * kSplitTokens, latents,
                               count, (s.rank + V::kLanes - 1) / V::kLanes,
                               partial + r * plan.partial_floats + plan.v_column[n],
                               plan.partial_floats);
    }
  }
}

}  // namespace
}  // namespace int8_ops::cpu
