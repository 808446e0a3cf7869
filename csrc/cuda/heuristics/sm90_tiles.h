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

// Note [Factor slots]
// The factors of a tile's columns come with its last K-block. Their slot may be written once the
// tile that used it last has been stored. When a stage is free to be filled again, every tile
// before the one that read it has been stored: the stores of a tile come before the release of any
// stage of the next but its first. So the producer, `stages` K-blocks ahead, needs this many slots.
constexpr int32_t factor_slots(int32_t stages, int64_t k_blocks) {
  return static_cast<int32_t>((stages + k_blocks) / k_blocks);
}

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
  static constexpr int32_t kHeadBytes = 256;  // barriers
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

}  // namespace int8_ops::cuda
