// The second half of latent_attention_decode: a query's splits become one, and the values' A is
// applied. Two kernels, or one where splits are few; for every path of the first half.
//
// Note [Order of a fold]
// A split's share is added by the class that its number names, number % kClasses, in ascending
// order; classes k apart by kFoldWarps are added first, (0 + 1) + (2 + 3), then those sums in
// order. Numbers count from the row's own first token, so what a window hides or other rows have
// changes nothing, nor does it matter which threads do it: a kernel for few rows gives a thread one
// class of few columns, one for many rows gives it four classes of more. Products and sums are
// written as fmaf: what the compiler contracts could differ between the two.
//
// Note [Lengths first]
// These kernels read the rows' lengths before they wait for the kernel before them, which is one of
// this op: it has waited itself before it let them in, so that whatever wrote the lengths is
// finished. Partial results and means are read after the wait.
#pragma once

#include <cstdint>

#include "divisor.h"
#include "partials.h"

namespace int8_ops::cuda::attention {

inline constexpr int32_t kFoldThreads = 256;
inline constexpr int32_t kFoldWarps = kFoldThreads / 32;
inline constexpr int32_t kClasses = 32;
inline constexpr int32_t kClassesApart = kClasses / kFoldWarps;
inline constexpr int32_t kFoldAhead = 8;       // splits whose loads a thread has under way
inline constexpr int32_t kStatsAtHand = 1024;  // splits' statistics in shared memory
// Vectors of four columns a block folds: where rows are few, and where they are many.
inline constexpr int32_t kNarrowFold = 8;
inline constexpr int32_t kWideFold = 32;

inline constexpr int32_t kProjectThreads = 128;
inline constexpr int32_t kProjectRows = 4;      // query rows that share the loads of A
inline constexpr int32_t kProjectElements = 2;  // of the head, a warp

struct CombineArgs {
  LatentAttentionParams p;
  Partials partials;
  float* folded;      // [batch][groups][group_rows][columns]: weighted means of the latents
  int32_t head_rows;  // query rows a KV head: heads / kv_heads * q_len
  int32_t parts;      // project: of kBlockElements elements of the head
  Divisor by_chunks;  // fold: of kFoldVectors vectors of columns
  Divisor by_group_rows;
  Divisor by_groups;
  Divisor by_q_len;
  Divisor by_row_tiles;  // project: of kProjectRows query rows of a head
  Divisor by_parts;
  Divisor by_kv_heads;
  Divisor by_group_heads;     // KV heads a group
  bool vector_a[kMaxSlices];  // rows of A start 4-byte aligned and end so
};

}  // namespace int8_ops::cuda::attention
