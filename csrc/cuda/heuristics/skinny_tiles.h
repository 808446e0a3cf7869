// The tiles of the path for few rows: a list that the heuristics choose from and that the kernel is
// instantiated for (skinny/skinny.cu). Host and device.
#pragma once

#include <cstddef>
#include <cstdint>

namespace int8_ops::cuda {

// What a block computes, `rows` rows of x times 16 columns a column of warps, and how its warps
// share it. A structural type, so that a kernel takes it as a template argument.
struct SkinnyTile {
  int32_t rows;     // of x: 8, or groups of 16, the m of an mma
  int32_t warps_n;  // each with 16 columns of the output (rows of w): two n8 of an mma
  int32_t warps_k;  // share the columns, each with a part of K; their sums meet in shared memory
  int32_t steps;    // K-blocks of weights that each warp has under way, in shared memory
  // Blocks on one multiprocessor of sm_90 where shared memory allows; a bound for the registers.
  int32_t blocks_per_sm;

  // A lane takes 16 bytes of K, a quad of lanes a K-block.
  static constexpr int32_t kBlockK = 64;
  static constexpr int32_t kStepBytes = 16 * kBlockK;  // of a warp
  // Words from row to row of the sums of 16 columns: 16 and a shift of the banks.
  static constexpr int32_t kSumPitch = 20;

  constexpr int32_t cols() const { return 16 * warps_n; }
  constexpr int32_t warps() const { return warps_n * warps_k; }
  constexpr int32_t threads() const { return 32 * warps(); }
  static constexpr int32_t k_blocks(int64_t k) {
    return static_cast<int32_t>((k + kBlockK - 1) / kBlockK);
  }
  constexpr int32_t k_blocks_per_warp(int64_t k) const {
    return (k_blocks(k) + warps_k - 1) / warps_k;
  }
  // Weights that a block has under way.
  constexpr int32_t bytes_in_flight() const { return warps() * steps * kStepBytes; }

  // Bytes from row to row of the quantized x: an odd number of K-blocks, so that the eight lanes of
  // a phase, which read a K-block of two neighbouring rows, read from 32 banks.
  static constexpr int32_t row_stride(int64_t k) { return (k_blocks(k) | 1) * kBlockK; }
  // The weights under way, sums, scales and bias, and what the quantization keeps a row.
  constexpr int32_t fixed_bytes() const {
    const int32_t sums = warps() * rows * kSumPitch * 4;
    const int32_t factors = ((rows + 2 * cols()) * 4 + 127) / 128 * 128;
    return (bytes_in_flight() + sums + factors + rows * (12 + 4) + 127) / 128 * 128;
  }
  // Of a problem of m rows: rows that are not there take no memory.
  constexpr int64_t shared_bytes(int64_t m, int64_t k) const {
    return fixed_bytes() + (m < rows ? m : rows) * static_cast<int64_t>(row_stride(k));
  }
};

// rows, warps_n, warps_k, steps, blocks_per_sm
inline constexpr SkinnyTile kSkinnyTiles[] = {
    {8, 1, 4, 8, 4},   // few weights: many small blocks
    {8, 1, 8, 8, 2},   // long K
    {8, 2, 8, 8, 1},   // long K and many columns: x is quantized once a multiprocessor
    {16, 2, 8, 8, 1},  // 9..16 rows
    {32, 2, 8, 3, 1},  // 17 rows and more: three steps leave room for 32 rows of 4096
    {32, 8, 2, 4, 1},  // the same for short K: all weights under way at once
};
inline constexpr size_t kNumSkinnyTiles = sizeof(kSkinnyTiles) / sizeof(kSkinnyTiles[0]);

}  // namespace int8_ops::cuda
