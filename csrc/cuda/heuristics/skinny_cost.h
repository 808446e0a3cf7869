// What a tile of the path for few rows would cost: to choose among them, and between that path and
// another. Pure host code, no torch, no CUDA.
#pragma once

#include <cstdint>

#include "gemm_heuristics.h"
#include "skinny_tiles.h"

namespace int8_ops::cuda {

// Beyond, weights are read over and over: no plan of this path is worth its cost there.
inline constexpr int64_t kMaxSkinnyRows = 256;

struct SkinnyProblem {
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t out_bytes;  // of one element of the output
  int64_t x_bytes;    // of one element of x; 0: a and its scales are given

  bool operator==(const SkinnyProblem&) const = default;
};

// Blocks of a launch: columns of tiles that run at once, times rows of tiles.
struct SkinnyGrid {
  int32_t cols;
  int32_t rows;
};

// Whether a block of the tile has the shared memory that the rows take.
bool skinny_fits(const SkinnyTile& tile, int64_t m, int64_t k, const DeviceFacts& device);

// As many blocks as run at once, or as there are tiles. The tile fits.
SkinnyGrid skinny_grid(const SkinnyTile& tile, int64_t m, int64_t n, int64_t k,
                       const DeviceFacts& device);

// Comparable with a GemmPlan's cost. The tile fits.
double skinny_cost(const SkinnyProblem& problem, const DeviceFacts& device, const SkinnyTile& tile);

}  // namespace int8_ops::cuda
