// The second half of latent_attention_decode, shared by the instruction sets as
// simd_latent_attention.h is: a row's splits become one, and the values' A is applied.
#pragma once

#include "simd_latent_attention.h"

namespace int8_ops::cpu {
namespace {

// Folds the splits of one query in order, into the first one's place; false where it sees nothing.
template <typename V>
bool fold_splits(const LatentAttentionPlan& plan, float* first, int64_t splits, int64_t stride) {
  using Float = typename V::Float;
  float most = kNoScore;
  for (int64_t i = 0; i < splits; ++i) {
    const float own = first[i * stride + plan.sum_columns];
    most = own > most ? own : most;
  }
  float total = 0.0F;
  for (int64_t i = 0; i < splits; ++i) {
    const float* part = first + i * stride;
    const float own = part[plan.sum_columns];
    const float sum = part[plan.sum_columns + 1];
    // A split of which the query sees nothing has sums of 0, one of NaNs alone has a NaN.
    const float factor = own == kNoScore ? 0.0F : exponential_of<V>(own - most);
    total += factor * sum;
    const Float f = V::broadcast(factor);
    for (int64_t j = 0; j < plan.sum_columns; j += V::kLanes) {
      const Float y = V::mul(f, V::load_float32(part + j));
      V::store_float32(first + j, i == 0 ? y : V::add(V::load_float32(first + j), y));
    }
  }
  if (total == 0.0F) return false;
  const Float inverse = V::div(V::broadcast(1.0F), V::broadcast(total));
  for (int64_t j = 0; j < plan.sum_columns; j += V::kLanes) {
    V::store_float32(first + j, V::mul(V::load_float32(first + j), inverse));
  }
  return true;
}

// Element `row` of A times what the queries of a head have summed up, for kRows of them.
template <typename V, int kRows>
void project(const LatentSlice& s, int64_t row, const float* const* sums, float* y) {
  using Float = typename V::Float;
  Float acc[kRows];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) acc[i] = V::zero_float();
  const int8_t* a = s.a + row * s.rank;
  for (int64_t j = 0; j < s.rank; j += V::kLanes) {
    const Float x = load_int8<V>(a + j, least(s.rank - j, V::kLanes));
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) acc[i] = V::fma(x, V::load_float32(sums[i] + j), acc[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) y[i] += V::sum_of_lanes(acc[i]) * s.a_scale[row];
}

constexpr int64_t size_of_float(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// The sums' padding is zero: latents are staged with zeros, and A's rows are padded with them here.
template <typename V, int kRows>
void write_rows(const LatentAttentionParams& p, const LatentAttentionPlan& plan, int64_t head,
                const float* const* sums, const bool* any, const int64_t* at) {
  bool none = true;
  for (int i = 0; i < kRows; ++i) none = none && !any[i];
  if (none) {  // then there may be no sums at all
    const int64_t bytes = size_of_float(p.q_dtype);
    for (int i = 0; i < kRows; ++i) {
      std::memset(static_cast<char*>(p.out) + at[i] * bytes, 0, p.head_dim * bytes);
    }
    return;
  }
  for (int64_t j = 0; j < p.head_dim; ++j) {
    const int64_t row = head * p.head_dim + j;
    float y[kRows] = {};
    for (int64_t n = 0; n < p.v.count; ++n) {
      const float* columns[kRows];
      for (int i = 0; i < kRows; ++i) columns[i] = sums[i] + plan.v_column[n];
      project<V, kRows>(p.v.slices[n], row, columns, y);
    }
    float bias = 0.0F;
    if (p.v.bias != nullptr) {
      with_float_dtype(p.v.bias_dtype, [&](auto dtype) {
        bias = V::first_lane(load_floats<V, decltype(dtype)::value>(p.v.bias, row, 1));
      });
    }
    with_float_dtype(p.q_dtype, [&](auto dtype) {
      for (int i = 0; i < kRows; ++i) {
        store_floats<V, decltype(dtype)::value>(p.out, at[i] + j, 1,
                                                V::broadcast(any[i] ? y[i] + bias : 0.0F));
      }
    });
  }
}

template <typename V>
void combine_attention(const LatentAttentionParams& p, const LatentAttentionPlan& plan,
                       int64_t begin, int64_t end) {
  constexpr int kRows = 4;
  const int64_t split_floats = plan.group_heads * plan.head_rows * plan.partial_floats;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / p.kv_heads;
    const int64_t head = index % p.kv_heads;
    const DecodeRow row = decode_row(p, b);
    const int64_t splits = row.last_split - row.first_split;
    for (int64_t r = 0; r < plan.head_rows; r += kRows) {
      const float* sums[kRows];
      bool any[kRows];
      int64_t at[kRows];
      const int64_t count = least(plan.head_rows - r, kRows);
      for (int64_t i = 0; i < count; ++i) {
        float* first = partial_at(p, plan, b, head / plan.group_heads, 0,
                                  head % plan.group_heads * plan.head_rows + r + i);
        any[i] = fold_splits<V>(plan, first, splits, split_floats);
        sums[i] = first;
        at[i] = ((b * p.q_len + (r + i) % p.q_len) * p.heads + head * plan.repeats +
                 (r + i) / p.q_len) *
                p.head_dim;
      }
      if (count == kRows) {
        write_rows<V, kRows>(p, plan, head, sums, any, at);
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        write_rows<V, 1>(p, plan, head, sums + i, any + i, at + i);
      }
    }
  }
}

}  // namespace
}  // namespace int8_ops::cpu
