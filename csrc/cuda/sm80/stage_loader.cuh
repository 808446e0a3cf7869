// Global to shared memory: how a block's threads fill the stages of sm80/gemm.cuh (see the notes on
// layout and column order there).
#pragma once

#include <cstdint>

#include "../heuristics/gemm_tiles.h"
#include "../ptx/cp_async.cuh"
#include "gemm_args.cuh"

namespace int8_ops::cuda::sm80 {

// Sixteen bytes of a row that starts at any address, of which `valid` exist; the rest are zeros.
// Out of line: it must not crowd the path that every aligned matrix takes.
inline __device__ __noinline__ void copy_unaligned_16(uint8_t* shared, const int8_t* global,
                                                      int32_t valid) {
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (i < valid) {
      const auto byte = static_cast<uint8_t>(__ldg(global + i));
      words[i / 4] |= static_cast<uint32_t>(byte) << (8 * (i % 4));
    }
  }
  *reinterpret_cast<uint4*>(shared) = make_uint4(words[0], words[1], words[2], words[3]);
}

// One thread's part in loading one operand. Threads form kRowsPerPass rows of eight chunks and take
// a stage in passes; what differs between passes is then a constant.
//
// Rows beyond the matrix give sums that are never stored, so they may hold anything: the tiles for
// many rows read other rows, from the first on (all the same one would be a hot spot of L2), with
// no predicate. The tiles for few rows would multiply their traffic by that, and load zeros
// instead.
template <GemmTile kTile, bool kAligned, int kRows, bool kIsA>
struct OperandLoader {
  static constexpr int kRowBytes = GemmTile::kRowBytes;
  static constexpr int kChunksPerRow = kRowBytes / 16;
  static constexpr int kRowsPerPass = kTile.threads() / kChunksPerRow;
  static constexpr int kPasses = kRows * kTile.warps_k / kRowsPerPass;
  static constexpr int kPassesPerShare = kRows / kRowsPerPass;
  static constexpr bool kZeroRows = kIsA && kRows <= 32;
  static_assert(kRows % kRowsPerPass == 0, "a pass lies within one K-warp's share");

  // This thread's chunk in the K-block to load next, a pointer a pass (of the first share). Kept
  // rather than computed at each use: the copies hold their address registers until the load unit
  // takes them, and a pool of a few registers makes the warp wait for that.
  const int8_t* from[kPassesPerShare];
  int32_t rows_left;  // rows of the matrix from this thread's first row on
  uint32_t to;        // where the chunk goes, within a stage's part

  __device__ __forceinline__ void begin(const int8_t* base, int32_t first_row, int32_t row_limit,
                                        int32_t k, int32_t k_first) {
    const int chunk = threadIdx.x % kChunksPerRow;
    const int row = threadIdx.x / kChunksPerRow;
    rows_left = row_limit - first_row - row;
#pragma unroll
    for (int i = 0; i < kPassesPerShare; ++i) {
      int32_t source_row = first_row + row + i * kRowsPerPass;
      if (source_row >= row_limit) source_row = min(source_row - row_limit, row_limit - 1);
      from[i] = base + static_cast<int64_t>(source_row) * k + k_first;
      if constexpr (kAligned) ptx::keep_in_register(from[i]);
    }
    to = row * kRowBytes + (chunk ^ swizzle_key(row)) * 16;
    ptx::keep_in_register(to);
  }

  // Passes [kFirst, kLast) of the K-block, of which this thread's row has k_left bytes; `stage` is
  // the operand's part of the stage.
  template <int kFirst, int kLast>
  __device__ __forceinline__ void load(int32_t k_left, uint8_t* stage) const {
    const uint32_t stage_address = ptx::shared_address(stage);
#pragma unroll
    for (int pass = kFirst; pass < kLast; ++pass) {
      const int row = pass % kPassesPerShare * kRowsPerPass;  // beyond the thread's first
      const int share = pass / kPassesPerShare * kRowBytes;
      const int8_t* source = from[pass % kPassesPerShare] + share;
      const int32_t valid = kZeroRows && row >= rows_left ? 0 : k_left - share;
      // A thread's first row is below kRowsPerPass, so the keys of the two parts do not carry into
      // each other: key(first + row) = key(first) ^ key(row).
      const uint32_t place = (to ^ (swizzle_key(row) * 16)) + pass * kRowsPerPass * kRowBytes;
      if constexpr (kAligned) {
        ptx::cp_async_16(stage_address + place, source, valid > 0 ? 16 : 0);
      } else {
        copy_unaligned_16(stage + place, source, valid);
      }
    }
  }

  __device__ __forceinline__ void next_k_block() {
#pragma unroll
    for (const int8_t*& pointer : from) pointer += kTile.block_k();
  }

 private:
  static constexpr __host__ __device__ int swizzle_key(int row) {
    return kIsA ? row % 8 : (row / 8 % 4) * 2 + row % 2;
  }
};

// Both operands of a stage.
template <GemmTile kTile, bool kAligned>
struct StageLoader {
  int32_t k_left;  // bytes of a row from this thread's chunk on
  OperandLoader<kTile, kAligned, kTile.block_m, true> a;
  OperandLoader<kTile, kAligned, kTile.block_n, false> w;

  // For the K-blocks from k_block on of the tile that starts at (m_first, n_first).
  __device__ __forceinline__ void begin(const GemmArgs& args, int32_t m_first, int32_t n_first,
                                        int32_t k_block) {
    const int chunk = threadIdx.x % (GemmTile::kRowBytes / 16);
    const int32_t k_first = k_block * kTile.block_k() + chunk * 16;
    k_left = args.k - k_first;
    a.begin(args.a, m_first, args.m, args.k, k_first);
    w.begin(args.w, n_first, args.n, args.k, k_first);
  }

  // Part kPart of kParts of a stage; all parts together load it.
  template <int kPart, int kParts>
  __device__ __forceinline__ void load(uint8_t* stage) const {
    constexpr int kA = decltype(a)::kPasses;
    constexpr int kW = decltype(w)::kPasses;
    constexpr int kABytes = kTile.block_m * kTile.block_k();
    a.template load<kA * kPart / kParts, kA*(kPart + 1) / kParts>(k_left, stage);
    w.template load<kW * kPart / kParts, kW*(kPart + 1) / kParts>(k_left, stage + kABytes);
  }

  __device__ __forceinline__ void next_k_block() {
    k_left -= kTile.block_k();
    a.next_k_block();
    w.next_k_block();
  }
};

}  // namespace int8_ops::cuda::sm80
