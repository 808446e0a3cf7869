// How one matmul is cut into tasks: a pure function of the problem, the tile and the thread count.
//
// Note [Two matmul paths]
//   dot     few rows of a: w is read where it lies, once for every kDotRows rows of a (a constant
//           of the instruction set). Bound by the memory that holds w, so nothing is copied.
//   packed  more rows: a is packed once into row blocks, each task packs a panel of w that stays in
//           its cache, and a register tile of row block x 2 vectors of columns runs over a k block.
//           Between k blocks the sums wait in memory.
// int32 sums are exact in any order, so the choice never changes a bit of the result.
//
// Note [Workspace]
//   row block 0 | row block 1 | ... | panel, partial sums of task 0 | those of task 1 | ...
//   A row block is a header of kBlockHeaderBytes (int32 start values of its accumulators), then
//   [k / k_group][rows] groups of 4 bytes, then room for the overrun of the last vector store.
//   A panel is [panel_cols / cols] slivers of [k_block / k_group][cols] groups of 4 bytes.
//   Partial sums, absent where one k block is all of K: [pass_blocks][panel_cols / cols] register
//   tiles of int32.
#pragma once

#include "../common/params.h"

namespace int8_ops::cpu {

inline constexpr int64_t kBlockHeaderBytes = 64;

// What a kernel table tells of its packed path. max_rows == 0: it has the dot path only.
struct TileShape {
  int64_t max_rows;      // rows of the register tile
  int64_t cols;          // columns of the register tile
  int64_t k_group;       // values of k that share a 4-byte lane
  int64_t k_chunk;       // values of k that one packing step takes
  int64_t dot_max_rows;  // problems up to so many rows take the dot path
};

struct MatmulPlan {
  bool packed = false;
  int64_t tasks = 1;  // m_tasks * n_tasks
  int64_t m_tasks = 1;
  int64_t n_tasks = 1;
  // The rest is for the packed path alone.
  int64_t row_blocks = 0;   // even split of m: no block is much smaller than the others
  int64_t block_bytes = 0;  // from one row block to the next
  int64_t k_block = 0;      // a multiple of k_chunk
  int64_t pass_blocks = 0;  // row blocks that pass by one packed panel
  int64_t panel_cols = 0;
  int64_t sliver_bytes = 0;
  int64_t panel_bytes = 0;
  int64_t task_bytes = 0;  // panel and partial sums
  int64_t workspace_bytes = 0;
};

MatmulPlan plan_matmul(int64_t m, int64_t n, int64_t k, const TileShape& tile, int64_t threads);

// [begin, end) of part `index` when `total` things are cut into `parts` nearly equal parts.
struct Range {
  int64_t begin;
  int64_t end;
};
[[gnu::always_inline]] constexpr Range part_of(int64_t total, int64_t parts, int64_t index) {
  return {total * index / parts, total * (index + 1) / parts};
}

}  // namespace int8_ops::cpu
