// What the kernel for few rows is launched with, and the shared memory of a block.
#pragma once

#include <cstdint>

#include "../epilogue/scale_epilogue.cuh"
#include "../heuristics/skinny_tiles.h"
#include "../quantize/row_math.cuh"

namespace int8_ops::cuda::skinny {

// Neighbouring values of a row of x that a warp takes at once: two chunks a lane.
inline constexpr int kUnit = 512;

struct SkinnyArgs {
  const void* x;  // [m, k], of the kernel's T; int8: quantized already
  const int8_t* w;
  int32_t k;
  int32_t col_tiles;
  int32_t k_blocks_per_warp;
  int32_t row_stride;  // of the quantized x in shared memory, bytes
  // For i / units, exactly, as umulhi(2 i, units_inverse).
  int32_t units;  // a row
  uint32_t units_inverse;
  ScaleEpilogue epilogue;
};

// ceil(2^31 / units): exact quotients while i * units < 2^31.
constexpr uint32_t inverse_of(int32_t units) {
  return static_cast<uint32_t>(((int64_t{1} << 31) + units - 1) / units);
}

// The quantized rows follow, args.row_stride bytes each.
template <SkinnyTile kTile>
struct alignas(128) SharedStorage {
  // Of each warp; a step holds 16 bytes a lane of two rows: Note [Any order of k].
  uint8_t ring[kTile.warps()][kTile.steps * SkinnyTile::kStepBytes];
  int32_t sums[kTile.warps_n][kTile.warps_k][kTile.rows][SkinnyTile::kSumPitch];
  EpilogueFactors<kTile.rows, kTile.cols()> factors;
  RowFactor row_factors[kTile.rows];
  uint32_t amax[kTile.rows];  // bits of a float that is not negative, or NaN: ordered as integers
};

}  // namespace int8_ops::cuda::skinny
