// The scores of latent_attention_decode, shared by the instruction sets: V is the vector-ops struct
// of one of them. See simd_matmul.h for the rules of such a header, and Note [RoPE inside a tile]
// in latent_attention_plan.h.
//
// A sliver of latents (kTileCols tokens, packed as for a matmul) times a head's A gives int32 keys
// [head_dim][kTileCols], a token a lane; they are rotated by the tile's offsets and dotted with the
// folded queries.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "simd_matmul.h"

namespace int8_ops::cpu {
namespace {

// Queries that share a pass over a sliver's keys: 4 x kTileCols sums stay in registers.
constexpr int kQueryRows = 4;

inline float* floats_at(char* base, int64_t offset) {
  return reinterpret_cast<float*>(base + offset);
}

// `count` tokens' latents from `begin` on as int8 rows: where they lie, or in `staged` where they
// are packed, or padded to whole vectors with zeros where `whole` asks for that.
struct LatentRows {
  const int8_t* rows;
  int64_t stride;
};

inline LatentRows latent_rows(const LatentSlice& s, const DecodeTask& what, int64_t begin,
                              int64_t count, int64_t whole, int8_t* staged) {
  const int8_t* from = s.q + what.batch * s.q_batch_stride + what.group * s.q_group_stride +
                       begin * s.q_token_stride;
  if (!s.packed && s.rank % whole == 0) return {from, s.q_token_stride};
  const int64_t stride = round_up(s.rank, kFloatPad);
  const int64_t half = s.rank / 2;
  for (int64_t t = 0; t < count; ++t, from += s.q_token_stride) {
    int8_t* to = staged + t * stride;
    if (s.packed) {
      for (int64_t j = 0; j < half; ++j) {
        to[j] = static_cast<int8_t>(static_cast<int8_t>(from[j] << 4) >> 4);
      }
      for (int64_t j = 0; j < half; ++j) to[half + j] = static_cast<int8_t>(from[j] >> 4);
    } else {
      std::memcpy(to, from, s.rank);
    }
    std::memset(to + s.rank, 0, stride - s.rank);
  }
  return {staged, stride};
}

// Scales of `count` tokens; zeros up to a whole split.
inline void load_scales(const LatentSlice& s, const DecodeTask& what, int64_t begin, int64_t count,
                        float* out) {
  const float* from =
      s.scale + what.batch * s.scale_batch_stride + what.group * s.scale_group_stride + begin;
  std::memcpy(out, from, count * sizeof(float));
  std::memset(out + count, 0, (kSplitTokens - count) * sizeof(float));
}

// Rows of a head's row block: an even split, and never fewer than the register tile takes.
template <typename V>
inline int64_t rows_of_block(Range rows) {
  const int64_t count = rows.end - rows.begin;
  return count < V::kTileMinRows ? V::kTileMinRows : count;
}

inline char* key_block(const LatentAttentionParams& p, const LatentAttentionPlan& plan,
                       int64_t slice, int64_t head, int64_t block) {
  return static_cast<char*>(p.workspace) + plan.packed_a[slice] +
         (head * plan.blocks + block) * plan.a_block_bytes[slice];
}

template <typename V>
void pack_keys(const LatentAttentionParams& p, const LatentAttentionPlan& plan, int64_t begin,
               int64_t end) {
  for (int64_t head = begin; head < end; ++head) {
    for (int64_t n = 0; n < p.k.count; ++n) {
      const LatentSlice& s = p.k.slices[n];
      for (int64_t block = 0; block < plan.blocks; ++block) {
        const Range rows = part_of(p.head_dim, plan.blocks, block);
        const int64_t given = rows.end - rows.begin;
        const int64_t count = rows_of_block<V>(rows);
        const int8_t* a = s.a + (head * p.head_dim + rows.begin) * s.rank;
        char* out = key_block(p, plan, n, head, block);
        auto* start = reinterpret_cast<int32_t*>(out);
        for (int64_t i = 0; i < count; ++i) {
          start[i] = start_value<V>(a + (i < given ? i : given - 1) * s.rank, s.rank);
        }
        pack_lanes<V, false>(a, s.rank, s.rank, given, out + kBlockHeaderBytes, count * 4);
      }
    }
  }
}

// A split's latents of one slice, packed as slivers of weights. A sliver's tokens past the last one
// repeat it; their scores are never used.
template <typename V>
void pack_latents(const LatentSlice& s, LatentRows latents, int64_t count, int64_t sliver_bytes,
                  char* out) {
  for (int64_t t = 0; t < count; t += V::kTileCols, out += sliver_bytes) {
    for (int64_t v = 0; v < V::kTileCols; v += V::kLanes) {
      const int64_t first = least(t + v, count - 1);
      pack_lanes<V, true>(latents.rows + first * latents.stride, latents.stride, s.rank,
                          least(count - first, V::kLanes), out + v * 4, V::kTileCols * 4);
    }
  }
}

// The queries of one KV head times the scores' scale, as float32 pairs [row][2][half_stride].
template <typename V>
void load_queries(const LatentAttentionParams& p, const LatentAttentionPlan& plan, int64_t batch,
                  int64_t head, float* out) {
  const int64_t half = p.head_dim / 2;
  const typename V::Float scaling = V::broadcast(p.scaling);
  with_float_dtype(p.q_dtype, [&](auto dtype) {
    for (int64_t row = 0; row < plan.head_rows; ++row) {
      const int64_t at = batch * p.q_batch_stride +
                         (head * plan.repeats + row / p.q_len) * p.q_head_stride +
                         row % p.q_len * p.q_token_stride;
      for (int64_t part = 0; part < 2; ++part, out += plan.half_stride) {
        for (int64_t j = 0; j < half; j += V::kLanes) {
          const int64_t count = least(half - j, V::kLanes);
          const auto x = load_floats<V, decltype(dtype)::value>(p.q, at + part * half + j, count);
          V::store_float32(out + j, V::mul(x, scaling));
        }
      }
    }
  });
}

// Turns a head's queries by -(the tile's first angle) and folds A's scales in, a copy a slice; of
// the bias it makes the two factors that cosine and sine of an offset have in its score.
template <typename V>
void fold_queries(const LatentAttentionParams& p, const LatentAttentionPlan& plan, int64_t head,
                  const float* query, const float* base, float* folded) {
  using Float = typename V::Float;
  const int64_t half = p.head_dim / 2;
  const int64_t row_floats = 2 * plan.half_stride;
  const int64_t copy_floats = plan.head_rows * row_floats;
  const int64_t first_row = head * p.head_dim;
  for (int64_t j = 0; j < half; j += V::kLanes) {
    const int64_t count = least(half - j, V::kLanes);
    const Float c = V::load_float32(base + j);
    const Float s = V::load_float32(base + plan.half_stride + j);
    for (int64_t row = 0; row < plan.head_rows; ++row) {
      const float* from = query + row * row_floats + j;
      float* to = folded + row * row_floats + j;
      const Float first = V::load_float32(from);
      const Float second = V::load_float32(from + plan.half_stride);
      const Float turned_first = V::fma(second, s, V::mul(first, c));
      const Float turned_second = V::sub(V::mul(second, c), V::mul(first, s));
      for (int64_t n = 0; n < p.k.count; ++n, to += copy_floats) {
        const float* scale = p.k.slices[n].a_scale;
        const auto at = [&](int64_t r) __attribute__((always_inline)) {
          return load_floats<V, DType::kFloat32>(scale, first_row + r, count);
        };
        V::store_float32(to, V::mul(turned_first, at(j)));
        V::store_float32(to + plan.half_stride, V::mul(turned_second, at(half + j)));
      }
      if (p.k.bias == nullptr) continue;
      with_float_dtype(p.k.bias_dtype, [&](auto dtype) __attribute__((always_inline)) {
        constexpr DType kType = decltype(dtype)::value;
        const Float b = load_floats<V, kType>(p.k.bias, first_row + j, count);
        const Float d = load_floats<V, kType>(p.k.bias, first_row + half + j, count);
        V::store_float32(to, V::fma(turned_second, d, V::mul(turned_first, b)));
        V::store_float32(to + plan.half_stride,
                         V::sub(V::mul(turned_second, b), V::mul(turned_first, d)));
      });
    }
  }
}

// int32 keys [head_dim][kTileCols] -> rotated floats in their place.
template <typename V>
void rotate_keys(int64_t half, const float* offsets, int32_t* keys) {
  using Float = typename V::Float;
  for (int64_t j = 0; j < half; ++j, offsets += 2 * kRopeTile) {
    int32_t* one = keys + j * V::kTileCols;
    int32_t* two = one + half * V::kTileCols;
    for (int64_t v = 0; v < V::kTileCols; v += V::kLanes) {
      const Float c = V::load_float32(offsets + v);
      const Float s = V::load_float32(offsets + kRopeTile + v);
      const Float first = V::to_float(V::load_ints(one + v));
      const Float second = V::to_float(V::load_ints(two + v));
      V::store_float32(one + v, V::sub(V::mul(first, c), V::mul(second, s)));
      V::store_float32(two + v, V::fma(second, c, V::mul(first, s)));
    }
  }
}

// Two rows of kTileCols floats for each pair j: `one` and `two`, `step` floats from pair to pair.
struct PairRows {
  const float* one;
  const float* two;
  int64_t step;
};

// kRows queries against the pairs; sums times the tokens' scales to scores, or on top of them.
template <typename V, int kRows>
void dot_pairs(PairRows pairs, int64_t half, const float* query, int64_t half_stride,
               const float* scale, bool add, float* scores) {
  using Float = typename V::Float;
  constexpr int kVecs = V::kTileCols / V::kLanes;
  Float acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) acc[i][v] = V::zero_float();
  }
  for (int64_t j = 0; j < half; ++j) {
    Float first[kVecs];
    Float second[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      first[v] = V::load_float32(pairs.one + j * pairs.step + v * V::kLanes);
      second[v] = V::load_float32(pairs.two + j * pairs.step + v * V::kLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Float a = V::broadcast(query[i * 2 * half_stride + j]);
      const Float b = V::broadcast(query[(i * 2 + 1) * half_stride + j]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        acc[i][v] = V::fma(b, second[v], V::fma(a, first[v], acc[i][v]));
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* to = scores + i * kSplitTokens + v * V::kLanes;
      Float y = acc[i][v];
      if (scale != nullptr) y = V::mul(y, V::load_float32(scale + v * V::kLanes));
      V::store_float32(to, add ? V::add(V::load_float32(to), y) : y);
    }
  }
}

template <typename V, int kRows>
void dot_rows_of_pairs(PairRows pairs, int64_t half, int64_t rows, const float* query,
                       int64_t half_stride, const float* scale, bool add, float* scores) {
  for (; rows >= kRows; rows -= kRows) {
    dot_pairs<V, kRows>(pairs, half, query, half_stride, scale, add, scores);
    query += kRows * 2 * half_stride;
    scores += kRows * kSplitTokens;
  }
  if constexpr (kRows > 1) {
    if (rows > 0) {
      dot_rows_of_pairs<V, kRows - 1>(pairs, half, rows, query, half_stride, scale, add, scores);
    }
  }
}

// Scores of all queries of one KV head against the split's tokens.
template <typename V>
void score_head(const LatentAttentionParams& p, const LatentAttentionPlan& plan,
                const DecodeTask& what, int64_t head, int64_t count, char* scratch, float* scores) {
  const int64_t half = p.head_dim / 2;
  float* query = floats_at(scratch, plan.query);
  float* folded = floats_at(scratch, plan.folded);
  auto* keys = reinterpret_cast<int32_t*>(scratch + plan.sums);
  const float* offsets = floats_at(static_cast<char*>(p.workspace), plan.offsets);
  load_queries<V>(p, plan, what.batch, head, query);
  for (int64_t t = 0; t < count; t += V::kTileCols) {
    const int64_t tile = t / kRopeTile;
    if (t % kRopeTile == 0) {
      const float* base = floats_at(scratch, plan.base_angles) + tile * 2 * plan.half_stride;
      fold_queries<V>(p, plan, head, query, base, folded);
    }
    const float* own = offsets + t % kRopeTile;
    const float* copy = folded;
    const char* slivers = scratch + plan.k_packed;
    for (int64_t n = 0; n < p.k.count; ++n) {
      const char* sliver = slivers + t / V::kTileCols * plan.k_sliver_bytes[n];
      for (int64_t block = 0; block < plan.blocks; ++block) {
        const Range rows = part_of(p.head_dim, plan.blocks, block);
        tile_rows<V, V::kTileRows>(rows_of_block<V>(rows), key_block(p, plan, n, head, block),
                                   {0, p.k.slices[n].rank}, sliver,
                                   keys + rows.begin * V::kTileCols);
      }
      rotate_keys<V>(half, own, keys);
      const auto* rotated = reinterpret_cast<const float*>(keys);
      const float* scale = floats_at(scratch, plan.token_scale) + n * kSplitTokens + t;
      dot_rows_of_pairs<V, kQueryRows>({rotated, rotated + half * V::kTileCols, V::kTileCols}, half,
                                       plan.head_rows, copy, plan.half_stride, scale, n > 0,
                                       scores + t);
      copy += plan.head_rows * 2 * plan.half_stride;
      slivers += kSplitTokens / V::kTileCols * plan.k_sliver_bytes[n];
    }
    if (p.k.bias != nullptr) {
      dot_rows_of_pairs<V, kQueryRows>({own, own + kRopeTile, 2 * kRopeTile}, half, plan.head_rows,
                                       copy, plan.half_stride, nullptr, true, scores + t);
    }
  }
}

}  // namespace
}  // namespace int8_ops::cpu
