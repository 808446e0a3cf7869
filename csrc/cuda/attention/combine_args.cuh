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
#pragma once

#include <cstdint>

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
  float* folded;              // [batch][groups][group_rows][columns]: weighted means of the latents
  int32_t chunks;             // fold: of kFoldVectors vectors of columns
  int32_t head_rows;          // query rows a KV head: heads / kv_heads * q_len
  int32_t row_tiles;          // project: of kProjectRows query rows of a head
  int32_t parts;              // project: of kBlockElements elements of the head
  bool vector_a[kMaxSlices];  // rows of A start 4-byte aligned and end so
};

}  // namespace int8_ops::cuda::attention
