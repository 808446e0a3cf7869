// What the two halves of latent_attention_decode hand over: partial results of splits.
//
// Note [Splits on CUDA]
// A row's tokens are cut at fixed distances from its own first token, kSplitTokens
// apart, whatever the batch, the path or the number of new tokens. A split yields for each query a
// maximum, a sum of exponentials and a weighted sum of latents; the second half folds a row's
// splits in an order that depends on their numbers alone. So a query's result is a function of its
// own row, to the bit. Lengths are read on the device: a buffer has room for the splits of a whole
// cache, and those that a row doesn't have are neither written nor read.
#pragma once

#include <vector_types.h>

#include "../../common/params.h"

#if defined(__CUDACC__)
#define INT8_OPS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define INT8_OPS_HOST_DEVICE inline
#endif

namespace int8_ops::cuda::attention {

inline constexpr int32_t kSplitTokens = 256;
inline constexpr float kLog2E = 1.4426950408889634F;  // scores are in units of log 2

// Bytes of a token's latent.
INT8_OPS_HOST_DEVICE constexpr int32_t width_of(const LatentSlice& s) {
  return static_cast<int32_t>(s.packed ? s.rank / 2 : s.rank);
}

// A query's number within its group: its KV head, then the head's queries, then the new tokens.
struct Partials {
  // [batch][groups][splits][group_rows][columns]: sum of exp2(score - most) times the token's scale
  // times its integers; a slice's values start at column_of[slice], packed ones in their own order.
  float* sums = nullptr;
  // [batch][groups][splits][group_rows]: most, the largest score, in units of log 2 (the scores are
  // scaled by log2(e)), and the sum of exp2(score - most). Where the query sees nothing of a split,
  // most is -inf and sums are not written.
  float2* stats = nullptr;
  int32_t splits = 0;  // of a cache that is full
  int32_t group_rows = 0;
  int32_t columns = 0;  // a multiple of 4
  int32_t column_of[kMaxSlices] = {};

  INT8_OPS_HOST_DEVICE int64_t index(int64_t batch_group, int64_t split, int64_t row) const {
    return (batch_group * splits + split) * group_rows + row;
  }
};

// The tokens [begin, end) of a row, and the splits of them that a query may see.
struct DecodeRow {
  int32_t begin;
  int32_t end;
  int32_t first_split;
  int32_t last_split;  // one past
};

#if defined(__CUDACC__)
__device__ __forceinline__ DecodeRow decode_row(const LatentAttentionParams& p, int64_t b) {
  DecodeRow row = {max(p.start[b], 0), min(p.length[b], static_cast<int32_t>(p.capacity)), 0, 0};
  row.end = max(row.begin, row.end);
  row.last_split = (row.end - row.begin + kSplitTokens - 1) / kSplitTokens;
  if (p.window > 0) {
    const int64_t unseen = row.end - p.q_len - p.window + 1 - row.begin;
    row.first_split = static_cast<int32_t>(unseen > 0 ? unseen / kSplitTokens : 0);
  }
  return row;
}

// Slots [x, y) that new token i of the row sees.
__device__ __forceinline__ int2 tokens_seen(const LatentAttentionParams& p, const DecodeRow& row,
                                            int32_t i) {
  const int32_t own = row.end - static_cast<int32_t>(p.q_len) + i;
  const int64_t low = p.window > 0 ? own - p.window + 1 : row.begin;
  return make_int2(low > row.begin ? static_cast<int32_t>(low) : row.begin, own + 1);
}
#endif

}  // namespace int8_ops::cuda::attention
