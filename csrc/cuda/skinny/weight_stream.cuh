// The weights of one warp: global memory --cp.async--> a ring of its own --> registers for mma.
#pragma once

#include "../ptx/cp_async.cuh"
#include "skinny_args.cuh"

namespace int8_ops::cuda::skinny {

// Note [Any order of k]
// A product sums over k in whatever order, as long as w and x agree on it. So lane 4 g + t takes 16
// neighbouring bytes of a K-block, k = 16 t .. 16 t + 15, of rows g and g + 8 of w: its four words
// are the two words each that mma wants from it for two k32 steps. It takes the same 16 bytes of x.
// No exchange between lanes and no swizzle: a lane reads from shared memory what it copied there
// itself, so that no barrier stands between the two, and a quad reads 64 neighbouring bytes.
//
// Note [Weights under way]
// The ring holds kSteps K-blocks a warp. As soon as one was multiplied, the copy of the one kSteps
// further on takes its place, over the edge of an output tile too: the copies never run dry before
// the block's last tile. A ring in registers would spare shared memory, but its loads stand where
// ptxas puts them: behind all the products of a round, whatever the source says.
template <SkinnyTile kTile>
class WeightStream {
 public:
  static constexpr int kSteps = kTile.steps;

  // The two rows' 16 bytes of this lane, of one K-block.
  struct Block {
    uint4 low;   // row g
    uint4 high;  // row g + 8
  };

  // The warp's columns start at `col` of each tile, its part of K at k_begin. Starts the first
  // kSteps copies.
  __device__ __forceinline__ WeightStream(const SkinnyArgs& args, uint8_t* ring, int32_t col,
                                          int32_t k_begin, int32_t k_blocks, int lane)
      : args_(args),
        ring_(ring + lane * 16),
        col_(col + lane / 4),
        k_first_(k_begin + lane % 4 * 16),
        k_blocks_(k_blocks),
        tile_(k_blocks > 0 ? static_cast<int32_t>(blockIdx.x) : args.col_tiles) {
    start_tile();
    if (k_blocks < kSteps) {
#pragma unroll 1
      for (int i = 0; i < kSteps; ++i) copy_next();
      return;
    }
    // The same, all of it in the first tile: offsets are constants then, and the copies start
    // sooner.
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      copy(i, i * SkinnyTile::kBlockK);
      ptx::cp_async_commit_group();
    }
    advance(kSteps);
  }

  // The next K-block of this warp. Its place is free for another once copy_next() is called.
  __device__ __forceinline__ Block take() const {
    ptx::cp_async_wait_group<kSteps - 1>();
    const uint8_t* const from = ring_ + slot_ * SkinnyTile::kStepBytes;
    Block block;
    block.low = *reinterpret_cast<const uint4*>(from);
    block.high = *reinterpret_cast<const uint4*>(from + SkinnyTile::kStepBytes / 2);
    return block;
  }

  // A group is committed even where nothing is left to copy, so that take()'s count holds.
  __device__ __forceinline__ void copy_next() {
    if (tile_ < args_.col_tiles) {
      copy(slot_, 0);
      advance(1);
    }
    ptx::cp_async_commit_group();
    slot_ = slot_ + 1 == kSteps ? 0 : slot_ + 1;
  }

 private:
  // Columns that are not there read the last one: what they become is not stored.
  __device__ __forceinline__ void start_tile() {
    const int32_t last = args_.epilogue.n - 1;
    const int32_t col = tile_ * kTile.cols() + col_;
    low_ = args_.w + static_cast<int64_t>(min(col, last)) * args_.k + k_first_;
    high_ = args_.w + static_cast<int64_t>(min(col + 8, last)) * args_.k + k_first_;
    k_ = k_first_;
    left_ = k_blocks_;
  }

  // The K-block `offset` bytes further on. Zeros past the end of a row: x may hold anything there.
  __device__ __forceinline__ void copy(int slot, int offset) {
    const uint32_t to = ptx::shared_address(ring_ + slot * SkinnyTile::kStepBytes);
    const int32_t bytes = k_ + offset < args_.k ? 16 : 0;
    ptx::cp_async_16_far(to, low_ + offset, bytes);
    ptx::cp_async_16_far(to + SkinnyTile::kStepBytes / 2, high_ + offset, bytes);
  }
  __device__ __forceinline__ void advance(int blocks) {
    low_ += blocks * SkinnyTile::kBlockK;
    high_ += blocks * SkinnyTile::kBlockK;
    k_ += blocks * SkinnyTile::kBlockK;
    left_ -= blocks;
    if (left_ == 0) {
      tile_ += static_cast<int32_t>(gridDim.x);
      start_tile();
    }
  }

  const SkinnyArgs& args_;
  uint8_t* const ring_;  // where this lane's bytes of slot 0 lie
  const int32_t col_;
  const int32_t k_first_;  // of this lane
  const int32_t k_blocks_;
  // What is copied next: one round of the ring ahead of what is taken next.
  int32_t tile_;
  const int8_t* low_;
  const int8_t* high_;
  int32_t k_;
  int32_t left_;  // K-blocks of the tile
  int32_t slot_ = 0;
};

}  // namespace int8_ops::cuda::skinny
