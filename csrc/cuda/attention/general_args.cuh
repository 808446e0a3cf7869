// How the general path divides its work and a block's shared memory.
//
// Note [General path]
// A block attends for some query rows of one KV head to split after split; each of its eight warps
// has 32 of a split's tokens, 16 at a time. Keys are int32 sums by mma.sync: the tokens' latents
// are the operand of 16 rows and stay in registers where they fit, A's rows pass by in shared
// memory, eight RoPE pairs at a time: first halves and second halves, so that a thread has both of
// a pair. The K of a product is numbered so that a lane's 16 consecutive bytes are its operands of
// two products, and of packed bytes the low halves and the high halves are products of their own.
//
// What follows is float32 for every dtype: keys are scaled, biased and rotated by their offset
// within the warp's tokens (Note [RoPE inside a tile] in cpu/latent_attention_plan.h), and dotted
// with the queries, which were turned by minus the warp's first angle. Then weights of the whole
// split, and weights times the values' latents.
//
// Products and sums of floats are fmaf and __fmul_rn, and panels are as large as the most rows
// allow: a query's bits must not differ between the kernels for few and for many rows.
#pragma once

#include <cstdint>

#include "partials.h"

namespace int8_ops::cuda::attention {

inline constexpr int32_t kThreads = 256;
inline constexpr int32_t kWarps = kThreads / 32;
inline constexpr int32_t kWarpTokens = kSplitTokens / kWarps;
inline constexpr int32_t kTilePairs = 8;  // RoPE pairs of a tile of A's rows
inline constexpr int32_t kTileRows = 2 * kTilePairs;
inline constexpr int32_t kStepBytes = 64;  // of a token's latent: two products
inline constexpr int32_t kTablePad = 8;    // float2s: rows of the offset table differ in banks
inline constexpr int32_t kMaxRows = 8;     // query rows of a block
inline constexpr int32_t kHeldSteps = 4;   // of the keys' latents, in registers
static_assert(kWarpTokens == 32 && kThreads == kSplitTokens);

// Offsets into a block's shared memory, in bytes.
struct GeneralShared {
  uint32_t a = 0;        // int8 [panel rows][pitch]
  uint32_t a_scale = 0;  // float [slices][panel rows]
  uint32_t bias = 0;     // float [panel rows]
  uint32_t table = 0;    // float2 [kWarpTokens][panel pairs + kTablePad]: cosine, sine
  uint32_t queries = 0;  // float2 [kWarps][rows][panel pairs]; later the sums of token groups
  uint32_t plain = 0;    // float [rows][2][panel pairs]: queries as they are, scaled
  uint32_t scores = 0;   // float [rows][kSplitTokens]
  uint32_t weights = 0;  // float [kSplitTokens][rows]
  uint32_t k_scale = 0;  // float [slices][kSplitTokens]
  uint32_t seen = 0;     // int2 [rows]
  uint32_t q_rows = 0;   // int64 [rows]: elements from a batch row's first query
  uint32_t bytes = 0;
};

// A step's slice, the byte of a token's latent where it begins, and which values it holds.
enum class StepKind : int32_t { kInt8, kLow, kHigh };
struct Step {
  int32_t slice;
  int32_t byte;
  StepKind kind;
  bool last;  // of its slice
};

struct GeneralArgs {
  LatentAttentionParams p;
  Partials partials;
  GeneralShared shared;
  int32_t group_heads;  // KV heads a group
  int32_t repeats;      // query heads a KV head
  int32_t head_rows;    // query rows a KV head
  int32_t row_blocks;   // blocks that share them
  int32_t lanes;        // groups * group_heads * row_blocks
  int32_t workers;      // blocks that share a lane's splits
  int32_t tiles;        // of kTilePairs pairs
  int32_t panel_tiles;  // that are in shared memory at once
  int32_t steps;        // of kStepBytes, of all slices of the keys
  int32_t pitch;        // bytes from row to row of A in shared memory
  bool a_in_shared;
  Step held[kHeldSteps];  // the steps, where there are no more and all latents are wide
  // Whether 16 bytes of latents, of A, and four of values may be read at once.
  bool wide_k[kMaxSlices];
  bool wide_a[kMaxSlices];
  bool wide_v[kMaxSlices];
};

INT8_OPS_HOST_DEVICE int32_t steps_of(const LatentSlice& s) {
  return (width_of(s) + kStepBytes - 1) / kStepBytes * (s.packed ? 2 : 1);
}

// Walks the steps of a stream, slice after slice.
struct StepWalk {
  const LatentStream& stream;
  int32_t slice = 0;
  int32_t own = 0;  // within the slice

  INT8_OPS_HOST_DEVICE Step next() {
    const LatentSlice& s = stream.slices[slice];
    Step step = {slice, own * kStepBytes, StepKind::kInt8, ++own == steps_of(s)};
    if (s.packed) {
      step.byte = (own - 1) / 2 * kStepBytes;
      step.kind = own % 2 == 1 ? StepKind::kLow : StepKind::kHigh;
    }
    if (step.last) {
      own = 0;
      ++slice;
    }
    return step;
  }
};

}  // namespace int8_ops::cuda::attention
