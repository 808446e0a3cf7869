// How latent_attention_decode is cut into tasks on the CPU, where its workspace keeps what, and the
// angles of RoPE: all that does not depend on the instruction set.
//
// Note [Splits of a row]
// A row's tokens are cut at fixed distances from its own first token, kSplitTokens apart, whatever
// the batch, the threads or the number of new tokens. A split yields, for each of its queries, a
// maximum, a sum of exponentials and a weighted sum of latents; combine() folds a row's splits in
// order. So a query's result is a function of its own row alone, to the bit: alone or in a batch,
// padded on the left or not, one new token a pass or sixteen.
//
// Note [RoPE inside a tile]
// A rotation by t0 + i is one by t0 after one by i. The keys of a tile of kRopeTile tokens are
// rotated by a table of the offsets i, the same for every tile, and the query by -t0 instead of all
// of them by t0: no cosine or sine a token is ever made. Angles are made in float64 from position
// times inverse frequency and then multiplied up as complex numbers, which costs a few 2^-53 each.
#pragma once

#include "../common/params.h"
#include "matmul_plan.h"

namespace int8_ops::cpu {

inline constexpr int64_t kSplitTokens = 256;
inline constexpr int64_t kRopeTile = 32;
inline constexpr int64_t kTilesPerSplit = kSplitTokens / kRopeTile;
// Rows of floats are padded to whole vectors of every instruction set.
inline constexpr int64_t kFloatPad = 16;

[[gnu::always_inline]] constexpr int64_t round_up(int64_t x, int64_t step) {
  return (x + step - 1) / step * step;
}

// A row of the batch: its tokens [begin, end), and the splits of them that any query sees.
struct DecodeRow {
  int64_t begin;
  int64_t end;
  int64_t first_split;
  int64_t last_split;  // one past
};

[[gnu::always_inline]] inline DecodeRow decode_row(const LatentAttentionParams& p, int64_t b) {
  const int64_t begin = p.start[b] > 0 ? p.start[b] : 0;
  const int64_t end = p.length[b] < p.capacity ? p.length[b] : p.capacity;
  DecodeRow row = {begin, end > begin ? end : begin, 0, 0};
  row.last_split = (row.end - begin + kSplitTokens - 1) / kSplitTokens;
  const int64_t seen = p.window > 0 ? row.end - p.q_len - p.window + 1 - begin : 0;
  if (seen > 0) row.first_split = seen / kSplitTokens;
  return row;
}

// The tokens that query i of the row sees.
[[gnu::always_inline]] inline Range tokens_seen(const LatentAttentionParams& p,
                                                const DecodeRow& row, int64_t i) {
  const int64_t own = row.end - p.q_len + i;
  const int64_t low = p.window > 0 ? own - p.window + 1 : row.begin;
  return {low > row.begin ? low : row.begin, own + 1};
}

// Offsets are bytes into the workspace, those of a worker's scratch into its part.
struct LatentAttentionPlan {
  int64_t group_heads = 0;  // KV heads a group
  int64_t repeats = 0;      // query heads a KV head
  int64_t head_rows = 0;    // query rows a KV head: repeats * q_len
  int64_t splits = 0;       // of the row that has most
  int64_t head_parts = 0;   // tasks that share the heads of one group and split
  int64_t tasks = 0;
  int64_t workers = 0;
  int64_t half_stride = 0;  // head_dim / 2, padded
  // The keys' A, packed for the register tile: a head is `blocks` row blocks.
  int64_t blocks = 0;
  int64_t a_block_bytes[kMaxSlices] = {};
  int64_t packed_a[kMaxSlices] = {};
  int64_t k_sliver_bytes[kMaxSlices] = {};
  // A query's partial result: sums of each slice's latents, then maximum and sum of exponentials.
  int64_t v_column[kMaxSlices] = {};
  int64_t sum_columns = 0;
  int64_t partial_floats = 0;
  int64_t offsets = 0;  // float [head_dim / 2][cos, sin][kRopeTile]
  int64_t partials = 0;
  int64_t scratch = 0;
  int64_t scratch_bytes = 0;
  int64_t base_angles = 0;  // float [kTilesPerSplit][cos, sin][half_stride]
  int64_t query = 0;        // float [head_rows][2][half_stride]
  int64_t folded = 0;       // the same for each slice, and for the bias
  int64_t sums = 0;
  int64_t token_scale = 0;  // float [kMaxSlices][kSplitTokens]
  int64_t scores = 0;       // float [query rows][kSplitTokens]
  int64_t weights = 0;
  int64_t staged = 0;    // int8 [kSplitTokens][the largest rank, padded]
  int64_t k_packed = 0;  // of each slice, kSplitTokens of slivers
  int64_t workspace_bytes = 0;
};

LatentAttentionPlan plan_latent_attention(const LatentAttentionParams& p, const TileShape& tile,
                                          int64_t threads);

// Cosines and sines of the offsets 0..kRopeTile - 1, into the workspace.
void fill_offset_table(const LatentAttentionParams& p, const LatentAttentionPlan& plan);

// Those of the first position of each tile of a task's split, into its scratch.
void fill_base_angles(const LatentAttentionParams& p, const LatentAttentionPlan& plan, int64_t task,
                      char* scratch);

// What a task number stands for.
struct DecodeTask {
  int64_t batch;
  int64_t group;
  int64_t split;  // counted from the row's first one
  Range heads;    // KV heads of the group
};

[[gnu::always_inline]] inline DecodeTask decode_task(const LatentAttentionPlan& plan,
                                                     const LatentAttentionParams& p, int64_t task) {
  const int64_t part = task % plan.head_parts;
  const int64_t split = task / plan.head_parts % plan.splits;
  const int64_t group = task / plan.head_parts / plan.splits;
  return {
      group / p.groups,
      group % p.groups,
      split,
      {plan.group_heads * part / plan.head_parts, plan.group_heads * (part + 1) / plan.head_parts}};
}

// The partial result of query row `row` (of its group) in a split.
[[gnu::always_inline]] inline float* partial_at(const LatentAttentionParams& p,
                                                const LatentAttentionPlan& plan, int64_t batch,
                                                int64_t group, int64_t split, int64_t row) {
  const int64_t group_rows = plan.group_heads * plan.head_rows;
  const int64_t index = ((batch * p.groups + group) * plan.splits + split) * group_rows + row;
  return reinterpret_cast<float*>(static_cast<char*>(p.workspace) + plan.partials) +
         index * plan.partial_floats;
}

}  // namespace int8_ops::cpu
