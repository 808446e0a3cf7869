// The tiles of the Hopper path (wgmma): what the heuristics choose from, what the kernels are
// instantiated for (sm90/instantiations), and what the build-info module prints. Host and device.
#pragma once

#include <cstddef>
#include <cstdint>

namespace int8_ops::cuda {

// Stages below which the copy engine can't keep ahead.
inline constexpr int32_t kWantedStages = 8;

// Counters of rows that are quantized beside the products: one for so many.
inline constexpr int64_t kSm90CountedRows = 128;

inline constexpr int32_t kSm90MaxStages = 12;

// How a block's shared memory is divided.
struct Sm90Shared {
  int32_t stages = 0;        // 0: it does not fit
  int32_t factor_slots = 0;  // tiles whose column factors may be there at once
  int32_t bytes = 0;
};

// The factors of a tile's columns come with its last K-block, to a slot of their own, which is free
// again when the tile is stored. The producer is `stages` K-blocks ahead, and the tile before those
// may not be stored yet: with so many slots it never waits for one.
constexpr int32_t factor_slots(int32_t stages, int64_t k_blocks) {
  return static_cast<int32_t>((stages + k_blocks) / k_blocks);
}
inline constexpr int32_t kSm90MaxFactorSlots = factor_slots(kSm90MaxStages, 1);

constexpr Sm90Shared divide_shared(int32_t limit_bytes, int32_t fixed_bytes, int32_t stage_bytes,
                                   int32_t slot_bytes, int64_t k_blocks) {
  for (int32_t stages = kSm90MaxStages; stages >= 2; --stages) {
    const int32_t slots = factor_slots(stages, k_blocks);
    const int32_t bytes = fixed_bytes + stages * stage_bytes + slots * slot_bytes;
    if (bytes <= limit_bytes) return {stages, slots, bytes};
  }
  return {};
}

// Rows of a stay in shared memory while all of w passes by: a block quantizes (or loads) 128 rows
// once and multiplies them with one tile of columns after the other. For short K.
struct ResidentTile {
  int32_t block_n;
  // Columns of 16-bit results on their way out at once: fewer leave more stages.
  int32_t staged_cols;
  // K-blocks of a tile that are started before the tile before it is stored.
  int32_t ahead;

  static constexpr int32_t kBlockM = 128;
  static constexpr int32_t kBlockK = 128;
  static constexpr int32_t kHeadBytes = 1024;  // scales of the rows, barriers
  static constexpr int32_t kThreads = 384;

  constexpr int32_t stage_bytes() const { return block_n * kBlockK; }
  constexpr int32_t slot_bytes() const { return block_n * 8 + kBlockM * 4; }
  constexpr int32_t staging_bytes() const { return kBlockM * staged_cols * 2; }
  static constexpr int64_t k_blocks(int64_t k) { return (k + kBlockK - 1) / kBlockK; }
  static constexpr int32_t rows_bytes(int64_t k) {
    return static_cast<int32_t>(k_blocks(k)) * kBlockM * kBlockK;
  }
  // With so many sets of rows.
  constexpr Sm90Shared shared(int64_t k, int32_t buffers, int32_t limit_bytes) const {
    return divide_shared(limit_bytes, kHeadBytes + staging_bytes() + buffers * rows_bytes(k),
                         stage_bytes(), slot_bytes(), k_blocks(k));
  }
};

// block_n, staged_cols, ahead
inline constexpr ResidentTile kResidentTiles[] = {
    {128, 128, 2},
};
// Rows beyond that leave no room for stages.
inline constexpr int64_t kMaxResidentK = 1024;
inline constexpr size_t kNumResidentTiles = sizeof(kResidentTiles) / sizeof(kResidentTiles[0]);

// Both operands stream through stages, for any K.
struct StreamTile {
  int32_t block_n;
  int32_t cluster_m;  // blocks of a cluster that share columns, and what they load of w
  int32_t cluster_n;  // blocks that share rows, and what they load of a
  int32_t group_m;    // rows of clusters that are worked on together

  static constexpr int32_t kBlockM = 128;
  static constexpr int32_t kBlockK = 128;
  static constexpr int32_t kHeadBytes = 512;  // barriers
  static constexpr int32_t kThreads = 384;

  constexpr int32_t stage_bytes() const { return (kBlockM + block_n) * kBlockK; }
  constexpr int32_t slot_bytes() const { return block_n * 8 + kBlockM * 4; }
  constexpr int32_t staged_cols() const { return block_n < 128 ? block_n : 128; }
  constexpr int32_t staging_bytes() const { return kBlockM * staged_cols() * 2; }
  constexpr Sm90Shared shared(int64_t k, int32_t limit_bytes) const {
    return divide_shared(limit_bytes, kHeadBytes + staging_bytes(), stage_bytes(), slot_bytes(),
                         (k + kBlockK - 1) / kBlockK);
  }
};

// block_n, cluster_m, cluster_n, group_m
inline constexpr StreamTile kStreamTiles[] = {
    {256, 2, 1, 4},  // large
    {128, 1, 2, 4},  // fewer tiles
    {64, 2, 1, 4},   // few rows, long K
};
inline constexpr size_t kNumStreamTiles = sizeof(kStreamTiles) / sizeof(kStreamTiles[0]);

// w stays in registers, some columns a block, and tiles of rows pass by. The blocks of a cluster
// hold neighbouring columns, and each loads or quantizes a share of the rows for all of them. For
// short K: what a cluster can't hold is another cluster's, with the same rows.
struct StationaryTile {
  int32_t cluster;

  static constexpr int32_t kBlockM = 64;
  static constexpr int32_t kBlockK = 128;
  static constexpr int32_t kThreads = 384;
  // Two warpgroups multiply 64 columns each. Of K = 1024 those are 128 registers a thread.
  static constexpr int32_t kUnitColumns = 128;
  static constexpr int32_t kMaxKBlocks = 8;
  static constexpr int32_t kMaxK = kMaxKBlocks * kBlockK;
  static constexpr int32_t kStagedBoxes = 2;  // of 64 rows by 64 columns of 16-bit results
  static constexpr int32_t kStagingBytes = 2 * kStagedBoxes * kBlockM * 128;
  static constexpr int32_t kMaxRowBuffers = 24;
  static constexpr int32_t kHeadBytes = 512;  // barriers

  static constexpr int32_t k_blocks(int64_t k) {
    return static_cast<int32_t>((k + kBlockK - 1) / kBlockK);
  }
  // What the kernels are compiled for.
  static constexpr int32_t held_k_blocks(int64_t k) {
    int32_t held = 1;
    while (held < k_blocks(k)) held *= 2;
    return held;
  }
  // Units of columns that a block can hold.
  static constexpr int32_t max_units(int64_t k) { return kMaxKBlocks / held_k_blocks(k); }
  // How many clusters it takes to hold n columns, and what each block then holds.
  constexpr int64_t parts(int64_t n, int64_t k) const {
    const int64_t held = int64_t{cluster} * max_units(k) * kUnitColumns;
    return (n + held - 1) / held;
  }
  constexpr int32_t units(int64_t n, int64_t k) const {
    const int64_t step = kUnitColumns * cluster * parts(n, k);
    return static_cast<int32_t>((n + step - 1) / step);
  }
  // Of a buffer: a tile's rows, and twice their scales.
  static constexpr int32_t rows_bytes(int64_t k) { return k_blocks(k) * kBlockM * kBlockK; }
  static constexpr int32_t scales_bytes() { return 2 * kBlockM * 4; }
  // w passes through the last buffers on its way to the registers; the others can take rows before.
  static constexpr int32_t early_buffers(int32_t units, int32_t buffers) {
    return buffers - units * (kUnitColumns / kBlockM);
  }
  // Stages are buffers of rows.
  constexpr Sm90Shared shared(int64_t n, int64_t k, int32_t limit_bytes) const {
    const int32_t columns = units(n, k) * kUnitColumns;
    const int32_t fixed = columns * 8 + kStagingBytes + kHeadBytes;
    const int32_t buffer = rows_bytes(k) + scales_bytes();
    const int32_t fit = (limit_bytes - fixed) / buffer;
    const int32_t buffers = fit < kMaxRowBuffers ? fit : kMaxRowBuffers;
    const bool enough = buffers >= 2 && early_buffers(units(n, k), buffers) >= 0;
    return enough ? Sm90Shared{buffers, 0, fixed + buffers * buffer} : Sm90Shared{};
  }
  // Int8 rows come in boxes of a K-block and a tile's rows, cut where there are fewer than blocks.
  static constexpr int32_t pieces(int32_t cluster, int32_t k_blocks) {
    int32_t pieces = 1;
    while (k_blocks * pieces % cluster != 0) pieces *= 2;
    return pieces;
  }
  // Of so long rows what a block quantizes of a tile goes to the others by way of L2: a group of
  // eight rows and their scales.
  static constexpr bool through_l2(int32_t k_blocks) { return k_blocks > kMaxKBlocks / 2; }
  static constexpr int32_t share_bytes(int32_t k_blocks) { return 8 * kBlockK * k_blocks + 128; }
  // A thread holds what its warp quantizes of a tile: enough blocks must share it.
  constexpr int64_t max_quantized_k() const { return int64_t{cluster} * kBlockK; }
  constexpr bool can_quantize(int64_t k) const { return k <= max_quantized_k(); }
};

inline constexpr StationaryTile kStationaryTiles[] = {{1}, {2}, {4}, {8}};
inline constexpr size_t kNumStationaryTiles =
    sizeof(kStationaryTiles) / sizeof(kStationaryTiles[0]);

}  // namespace int8_ops::cuda
