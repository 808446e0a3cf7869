// The tiles of the Hopper path for few rows and short K: a list that the heuristics choose from and
// that the kernel is instantiated for (sm90/panel.cu). Host and device.
#pragma once

#include <cstddef>
#include <cstdint>

namespace int8_ops::cuda {

// Few rows times few columns of short K a block, all of it at once: no loop, no stages. A cluster's
// blocks have the same columns, each with rows of its own, and bring w together.
struct PanelTile {
  int32_t rows;  // of a block: 8, 16 or 32, the n of a wgmma
  int32_t cols;
  int32_t cluster;

  static constexpr int32_t kMaxK = 512;  // of w a thread then holds 64 registers
  static constexpr int32_t kThreads = 256;
  static constexpr int32_t kBlocksPerSm = 2;  // a bound for the registers
  // Bytes from column to column of w in shared memory: K and a shift of the banks.
  static constexpr int32_t kWeightStride = kMaxK + 16;

  // Rows, w, scales of the rows, and a barrier; the kernel holds them to it.
  constexpr int32_t shared_bytes() const {
    const int32_t bytes = rows * kMaxK + cols * kWeightStride + rows * 4 + 8;
    return (bytes + 1023) / 1024 * 1024;
  }
  constexpr int32_t cluster_rows() const { return rows * cluster; }
};

// rows, cols, cluster
inline constexpr PanelTile kPanelTiles[] = {
    {8, 32, 1},    // up to 8 rows: many small blocks
    {8, 64, 2},    // 9 to 16
    {16, 64, 2},   // 17 to 64, and more where there are few columns
    {32, 128, 2},  // more rows
};
inline constexpr size_t kNumPanelTiles = sizeof(kPanelTiles) / sizeof(kPanelTiles[0]);
// Beyond, the paths that keep an operand read less.
inline constexpr int64_t kMaxPanelRows = 512;

}  // namespace int8_ops::cuda
