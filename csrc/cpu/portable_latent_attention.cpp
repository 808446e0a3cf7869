// latent_attention_decode in plain C++: the statement of the algorithm that the vectorised one in
// simd_latent_attention.h follows.
#include <cmath>
#include <limits>

#include "kernels.h"
#include "portable_floats.h"

namespace int8_ops::cpu {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// A token's latent as int8: where it lies, or unpacked into `buffer`.
const int8_t* latent_of(const LatentSlice& s, int64_t b, int64_t g, int64_t t, int8_t* buffer) {
  const int8_t* from = s.q + b * s.q_batch_stride + g * s.q_group_stride + t * s.q_token_stride;
  if (!s.packed) return from;
  const int64_t half = s.rank / 2;
  for (int64_t j = 0; j < half; ++j) {
    buffer[j] = static_cast<int8_t>(static_cast<int8_t>(from[j] << 4) >> 4);
    buffer[half + j] = static_cast<int8_t>(from[j] >> 4);
  }
  return buffer;
}

float scale_of(const LatentSlice& s, int64_t b, int64_t g, int64_t t) {
  return s.scale[b * s.scale_batch_stride + g * s.scale_group_stride + t];
}

// Query `row` of KV head `head` times the scores' scale, rotated by -(the tile's first position).
void rotate_query(const LatentAttentionParams& p, const LatentAttentionPlan& plan, int64_t b,
                  int64_t head, int64_t row, const float* base, float* out) {
  const int64_t half = p.head_dim / 2;
  const int64_t at = b * p.q_batch_stride +
                     (head * plan.repeats + row / p.q_len) * p.q_head_stride +
                     row % p.q_len * p.q_token_stride;
  for (int64_t j = 0; j < half; ++j) {
    const float first = load_as_float(p.q, p.q_dtype, at + j) * p.scaling;
    const float second = load_as_float(p.q, p.q_dtype, at + half + j) * p.scaling;
    const float c = base[j];
    const float s = base[plan.half_stride + j];
    out[j] = first * c + second * s;
    out[plan.half_stride + j] = second * c - first * s;
  }
}

// The key of one token of a slice without A's scale, or the bias, rotated by its offset and dotted
// with a query that A's scale has been folded into: key(j) is its element j.
template <typename Key>
float rotated_dot(const LatentAttentionParams& p, const LatentAttentionPlan& plan,
                  const float* query, int64_t offset, const Key& key) {
  const auto* table =
      reinterpret_cast<const float*>(static_cast<const char*>(p.workspace) + plan.offsets);
  const int64_t half = p.head_dim / 2;
  float sum = 0.0F;
  for (int64_t j = 0; j < half; ++j) {
    const float c = table[2 * j * kRopeTile + offset];
    const float s = table[(2 * j + 1) * kRopeTile + offset];
    const float first = key(j);
    const float second = key(half + j);
    sum += query[j] * (first * c - second * s);
    sum += query[plan.half_stride + j] * (second * c + first * s);
  }
  return sum;
}

// Scores of one tile of tokens [begin, begin + count), for the rows of one KV head.
void score_tile(const LatentAttentionParams& p, const LatentAttentionPlan& plan,
                const DecodeTask& what, int64_t head, int64_t begin, int64_t count,
                const float* base, char* scratch, float* scores) {
  const int64_t half = p.head_dim / 2;
  auto* rotated = reinterpret_cast<float*>(scratch + plan.query);
  auto* folded = reinterpret_cast<float*>(scratch + plan.folded);
  auto* keys = reinterpret_cast<int32_t*>(scratch + plan.sums);
  auto* buffer = reinterpret_cast<int8_t*>(scratch + plan.staged);
  for (int64_t row = 0; row < plan.head_rows; ++row) {
    float* out = rotated + row * 2 * plan.half_stride;
    rotate_query(p, plan, what.batch, head, row, base, out);
    for (int64_t i = 0; i < count; ++i) {
      scores[row * kSplitTokens + i] =
          p.k.bias == nullptr ? 0.0F : rotated_dot(p, plan, out, i, [&](int64_t j) {
            return load_as_float(p.k.bias, p.k.bias_dtype, head * p.head_dim + j);
          });
    }
  }
  for (int64_t n = 0; n < p.k.count; ++n) {
    const LatentSlice& s = p.k.slices[n];
    const int8_t* a = s.a + head * p.head_dim * s.rank;
    const float* a_scale = s.a_scale + head * p.head_dim;
    for (int64_t row = 0; row < plan.head_rows; ++row) {
      for (int64_t j = 0; j < half; ++j) {
        const int64_t at = row * 2 * plan.half_stride + j;
        folded[at] = rotated[at] * a_scale[j];
        folded[at + plan.half_stride] = rotated[at + plan.half_stride] * a_scale[half + j];
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const int8_t* latent = latent_of(s, what.batch, what.group, begin + i, buffer);
      for (int64_t j = 0; j < p.head_dim; ++j) keys[j] = dot(latent, a + j * s.rank, s.rank);
      const float scale = scale_of(s, what.batch, what.group, begin + i);
      for (int64_t row = 0; row < plan.head_rows; ++row) {
        const float sum = rotated_dot(p, plan, folded + row * 2 * plan.half_stride, i,
                                      [&](int64_t j) { return static_cast<float>(keys[j]); });
        scores[row * kSplitTokens + i] += sum * scale;
      }
    }
  }
}

// Scores of what a query sees -> exponentials; maximum and sum to out[0], out[1].
void exponentials(Range seen, float* scores, float* out) {
  float most = kNone;
  for (int64_t i = seen.begin; i < seen.end; ++i) most = std::fmax(most, scores[i]);
  float sum = 0.0F;
  for (int64_t i = seen.begin; i < seen.end; ++i) {
    scores[i] = std::exp(scores[i] - most);
    sum += scores[i];
  }
  out[0] = most;
  out[1] = sum;
}

Range within(Range tokens, int64_t begin, int64_t count) {
  const int64_t low = tokens.begin > begin ? tokens.begin - begin : 0;
  const int64_t high = tokens.end - begin < count ? tokens.end - begin : count;
  return {low, high > low ? high : low};
}

}  // namespace

void attend_split_portable(const LatentAttentionParams& p, const LatentAttentionPlan& plan,
                           int64_t task, char* scratch) {
  const DecodeTask what = decode_task(plan, p, task);
  const DecodeRow row = decode_row(p, what.batch);
  const int64_t begin = row.begin + (row.first_split + what.split) * kSplitTokens;
  if (begin >= row.end) return;
  const int64_t count = row.end - begin < kSplitTokens ? row.end - begin : kSplitTokens;
  const auto* angles = reinterpret_cast<const float*>(scratch + plan.base_angles);
  auto* scores = reinterpret_cast<float*>(scratch + plan.scores);
  auto* buffer = reinterpret_cast<int8_t*>(scratch + plan.staged);
  for (int64_t head = what.heads.begin; head < what.heads.end; ++head) {
    for (int64_t i = 0; i < count; i += kRopeTile) {
      score_tile(p, plan, what, what.group * plan.group_heads + head, begin + i,
                 count - i < kRopeTile ? count - i : kRopeTile,
                 angles + i / kRopeTile * 2 * plan.half_stride, scratch, scores + i);
    }
    for (int64_t r = 0; r < plan.head_rows; ++r) {
      float* out =
          partial_at(p, plan, what.batch, what.group, what.split, head * plan.head_rows + r);
      float* weights = scores + r * kSplitTokens;
      const Range seen = within(tokens_seen(p, row, r % p.q_len), begin, count);
      exponentials(seen, weights, out + plan.sum_columns);
      for (int64_t n = 0; n < p.v.count; ++n) {
        const LatentSlice& s = p.v.slices[n];
        float* sums = out + plan.v_column[n];
        for (int64_t j = 0; j < s.rank; ++j) sums[j] = 0.0F;
        for (int64_t i = seen.begin; i < seen.end; ++i) {
          const float weight = weights[i] * scale_of(s, what.batch, what.group, begin + i);
          const int8_t* latent = latent_of(s, what.batch, what.group, begin + i, buffer);
          for (int64_t j = 0; j < s.rank; ++j) sums[j] += weight * static_cast<float>(latent[j]);
        }
      }
    }
  }
}

void combine_attention_portable(const LatentAttentionParams& p, const LatentAttentionPlan& plan,
                                int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / p.kv_heads;
    const int64_t head = index % p.kv_heads;
    const int64_t group = head / plan.group_heads;
    const DecodeRow row = decode_row(p, b);
    const int64_t splits = row.last_split - row.first_split;
    for (int64_t r = 0; r < plan.head_rows; ++r) {
      const int64_t group_row = head % plan.group_heads * plan.head_rows + r;
      const auto split_at = [&](int64_t split) {
        return partial_at(p, plan, b, group, split, group_row);
      };
      float most = kNone;
      for (int64_t i = 0; i < splits; ++i) most = std::fmax(most, split_at(i)[plan.sum_columns]);
      // The first split's sums become the row's: nobody else reads them.
      float total = 0.0F;
      float* sums = splits > 0 ? split_at(0) : nullptr;
      for (int64_t i = 0; i < splits; ++i) {
        const float* part = split_at(i);
        const float own = part[plan.sum_columns];
        const float factor = own == kNone ? 0.0F : std::exp(own - most);
        total += factor * part[plan.sum_columns + 1];
        for (int64_t j = 0; j < plan.sum_columns; ++j) {
          sums[j] = (i > 0 ? sums[j] : 0.0F) + factor * part[j];
        }
      }
      const int64_t at =
          ((b * p.q_len + r % p.q_len) * p.heads + head * plan.repeats + r / p.q_len) * p.head_dim;
      for (int64_t j = 0; j < p.head_dim; ++j) {
        float y = 0.0F;
        const int64_t out_row = head * p.head_dim + j;
        for (int64_t n = 0; n < p.v.count && total != 0.0F; ++n) {
          const LatentSlice& s = p.v.slices[n];
          float sum = 0.0F;
          for (int64_t i = 0; i < s.rank; ++i) {
            sum += sums[plan.v_column[n] + i] * static_cast<float>(s.a[out_row * s.rank + i]);
          }
          y += sum / total * s.a_scale[out_row];
        }
        if (p.v.bias != nullptr && total != 0.0F) {
          y += load_as_float(p.v.bias, p.v.bias_dtype, out_row);
        }
        store_from_float(p.out, p.q_dtype, at + j, y);
      }
    }
  }
}

}  // namespace int8_ops::cpu
