// The GEMM tiles of the mma.sync path: a list that the heuristics choose from, that the kernel is
// instantiated for (sm80/instantiations), and that the build-info module prints. Host and device.
#pragma once

#include <cstddef>
#include <cstdint>

namespace int8_ops::cuda {

// One tile: what a block computes and how its warps share it. A structural type, so that a kernel
// takes it as a template argument.
struct GemmTile {
  int32_t block_m;
  int32_t block_n;
  int32_t warps_m;
  int32_t warps_n;
  // Warps that share an output tile and take turns along K; their sums meet in shared memory.
  int32_t warps_k;
  int32_t stages;
  // Blocks that fit on one multiprocessor of sm_90; a hint to the compiler and to the cost model.
  int32_t blocks_per_sm;
  // Percent of mma.sync's peak that the main loop reaches (H200, long K); for the cost model.
  int32_t rate;

  // Each K-warp reads rows of 128 bytes: eight 16-byte chunks, the period of the swizzle.
  static constexpr int32_t kRowBytes = 128;

  constexpr int32_t block_k() const { return kRowBytes * warps_k; }
  constexpr int32_t threads() const { return 32 * warps_m * warps_n * warps_k; }
  constexpr int32_t warp_m() const { return block_m / warps_m; }
  constexpr int32_t warp_n() const { return block_n / warps_n; }
  constexpr int32_t stage_bytes() const { return (block_m + block_n) * block_k(); }
  // The K-warps' partial sums reuse the stages' memory.
  constexpr int32_t reduce_bytes() const { return (warps_k - 1) * block_m * block_n * 4; }
  // Scales and bias of this tile and the next, before the stages.
  constexpr int32_t factor_bytes() const {
    return 2 * (((block_m + 2 * block_n) * 4 + kRowBytes - 1) / kRowBytes * kRowBytes);
  }
  // Rows that do not start 16-byte aligned are copied byte by byte: that path costs registers, and
  // its loads are the bottleneck, so only the smaller tiles have it.
  constexpr bool serves_unaligned() const { return warp_m() * warp_n() <= 32 * 32; }
  constexpr int32_t shared_bytes(int32_t used_stages) const {
    const int32_t stages_bytes = used_stages * stage_bytes();
    return factor_bytes() + (stages_bytes > reduce_bytes() ? stages_bytes : reduce_bytes());
  }
};

// block_m, block_n, warps_m, warps_n, warps_k, stages, blocks_per_sm, rate
inline constexpr GemmTile kGemmTiles[] = {
    {128, 256, 2, 4, 1, 3, 1, 70},  // large: the highest rate, 64 x 64 a warp
    {128, 128, 2, 2, 1, 3, 2, 65},  // two blocks a multiprocessor: one stores while one multiplies
    {64, 128, 2, 2, 2, 3, 1, 44},   // few tiles: eight warps on each
    {64, 64, 2, 2, 1, 4, 3, 41},    // fewer
    {32, 64, 1, 2, 2, 3, 3, 34},    // 17..32 rows
    {16, 64, 1, 2, 2, 4, 2, 20},    // decode: weights streamed
    {16, 32, 1, 1, 4, 4, 2, 12},    // decode, more blocks over the same weights
};
inline constexpr size_t kNumGemmTiles = sizeof(kGemmTiles) / sizeof(kGemmTiles[0]);

}  // namespace int8_ops::cuda
