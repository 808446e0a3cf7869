// The mma.sync GEMM kernel. One block computes one output tile (of one split of K):
//
//   global --cp.async--> shared stages --ldmatrix--> fragments --mma--> int32 registers -->
//   epilogue
//
// Note [Shared-memory layout]
// A stage holds, for every K-warp, block_m rows of a and block_n rows of w, 128 bytes a row. A row
// is eight 16-byte chunks; chunk c of a row lies at place c ^ key(row), so that the eight rows that
// one ldmatrix phase reads fall into eight different bank groups.
//   a: phases read eight neighbouring rows, key = row % 8.
//   w: phases read rows 8 i + 2 j + {0, 1}, i = 0..3 (see below), key = 2 (row / 8 % 4) + row % 2.
//
// Note [Column order]
// mma leaves lane 4 g + t with columns 2 t and 2 t + 1 of each n8 tile. Which rows of w make up a
// tile is ours to choose: tile j of a group of 32 columns takes rows 8 i + 2 j + e for its columns
// 2 i + e. The four tiles of a group then leave lane 4 g + t with columns 8 t .. 8 t + 7 of row g:
// eight neighbours, stored 16 bytes at a time with no exchange between lanes.
#pragma once

#include "../../common/params.h"
#include "../epilogue/scale_epilogue.cuh"
#include "../heuristics/gemm_tiles.h"
#include "../launch.cuh"
#include "../ptx/cp_async.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/mma_s8.cuh"

namespace int8_ops::cuda::sm80 {

struct GemmArgs {
  const int8_t* a;
  const int8_t* w;
  int32_t m;
  int32_t n;
  int32_t k;
  int32_t m_tiles;
  int32_t n_tiles;
  int32_t k_blocks_per_split;
  ScaleEpilogue epilogue;
};

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

// kAligned: every row of a and w starts 16-byte aligned, so that cp.async can move it.
template <GemmTile kTile, bool kAligned>
struct GemmKernel {
  static constexpr int kRowBytes = GemmTile::kRowBytes;
  static constexpr int kChunksPerRow = kRowBytes / 16;
  static constexpr int kStages = kTile.stages;
  static constexpr int kThreads = kTile.threads();
  static constexpr int kRowsPerPass = kThreads / kChunksPerRow;
  static constexpr int kMTiles = kTile.warp_m() / 16;
  static constexpr int kGroups = kTile.warp_n() / 32;  // groups of four n8 tiles
  static constexpr int kSteps = kRowBytes / 32;        // k32 steps of a row
  static constexpr int kABytes = kTile.block_m * kTile.block_k();

  static_assert(kTile.warp_m() % 16 == 0 && kTile.warp_n() % 32 == 0,
                "a warp computes whole m16 tiles and whole groups of 32 columns");
  static_assert(kTile.block_m * kTile.warps_k % kRowsPerPass == 0 &&
                    kTile.block_n * kTile.warps_k % kRowsPerPass == 0,
                "the threads load both operands in whole passes");
  static_assert(kSteps == 4, "run() spells its four steps out");
  static_assert(kStages >= 2, "a stage is loaded while another is read");

  using Factors = EpilogueFactors<kTile.block_m, kTile.block_n>;

  struct Fragments {
    uint32_t a[kMTiles][4];
    uint32_t w[kGroups][2][4];  // two pairs of n8 tiles a group
  };

  // ---- global -> shared ----------------------------------------------------------------------

  // One thread's part in loading one operand. Threads form kRowsPerPass rows of eight chunks and
  // take a stage in passes; what differs between passes is then a constant.
  //
  // Rows beyond the matrix give sums that are never stored, so they may hold anything: the tiles
  // for many rows read the last row again, with no predicate. The tiles for few rows would multiply
  // their traffic by that, and load zeros instead.
  template <int kRows, bool kIsA>
  struct OperandLoader {
    static constexpr int kPasses = kRows * kTile.warps_k / kRowsPerPass;
    static constexpr int kPassesPerShare = kRows / kRowsPerPass;
    static constexpr bool kZeroRows = kIsA && kRows <= 32;
    static_assert(kRows % kRowsPerPass == 0, "a pass lies within one K-warp's share");

    // This thread's chunk in the K-block to load next, a pointer a pass (of the first share). Kept
    // rather than computed at each use: the copies hold their address registers until the load
    // unit takes them, and a pool of a few registers makes the warp wait for that.
    const int8_t* from[kPassesPerShare];
    int32_t rows_left;  // rows of the matrix from this thread's first row on
    uint32_t to;        // where the chunk goes, within a stage's part

    __device__ __forceinline__ OperandLoader(const int8_t* base, int32_t first_row,
                                             int32_t row_limit, int32_t k, int32_t k_first) {
      const int chunk = threadIdx.x % kChunksPerRow;
      const int row = threadIdx.x / kChunksPerRow;
      rows_left = row_limit - first_row - row;
#pragma unroll
      for (int i = 0; i < kPassesPerShare; ++i) {
        const int32_t source_row = min(first_row + row + i * kRowsPerPass, row_limit - 1);
        from[i] = base + static_cast<int64_t>(source_row) * k + k_first;
        if constexpr (kAligned) ptx::keep_in_register(from[i]);
      }
      to = row * kRowBytes + (chunk ^ swizzle_key(row)) * 16;
      ptx::keep_in_register(to);
    }

    // Passes [kFirst, kLast) of the K-block, of which this thread's row has k_left bytes; `stage`
    // is the operand's part of the stage.
    template <int kFirst, int kLast>
    __device__ __forceinline__ void load(int32_t k_left, uint8_t* stage) const {
      const uint32_t stage_address = ptx::shared_address(stage);
#pragma unroll
      for (int pass = kFirst; pass < kLast; ++pass) {
        const int row = pass % kPassesPerShare * kRowsPerPass;  // beyond the thread's first
        const int share = pass / kPassesPerShare * kRowBytes;
        const int8_t* source = from[pass % kPassesPerShare] + share;
        const int32_t valid = kZeroRows && row >= rows_left ? 0 : k_left - share;
        // A thread's first row is below kRowsPerPass, so the keys of the two parts do not carry
        // into each other: key(first + row) = key(first) ^ key(row).
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

  struct StageLoader {
    int32_t k_left;  // bytes of a row from this thread's chunk on
    OperandLoader<kTile.block_m, true> a;
    OperandLoader<kTile.block_n, false> w;

    __device__ __forceinline__ StageLoader(const GemmArgs& args, int32_t m_first, int32_t n_first,
                                           int32_t k_first)
        : k_left(args.k - k_first),
          a(args.a, m_first, args.m, args.k, k_first),
          w(args.w, n_first, args.n, args.k, k_first) {}

    // Part kPart of kParts of a stage; all parts together load it.
    template <int kPart, int kParts>
    __device__ __forceinline__ void load(uint8_t* stage) const {
      constexpr int kA = decltype(a)::kPasses;
      constexpr int kW = decltype(w)::kPasses;
      a.template load<kA * kPart / kParts, kA*(kPart + 1) / kParts>(k_left, stage);
      w.template load<kW * kPart / kParts, kW*(kPart + 1) / kParts>(k_left, stage + kABytes);
    }
    __device__ __forceinline__ void next_k_block() {
      k_left -= kTile.block_k();
      a.next_k_block();
      w.next_k_block();
    }
  };

  // ---- shared -> fragments -> accumulators -----------------------------------------------------

  // Where this lane reads, relative to a stage, at step 0.
  struct LaneAddresses {
    uint32_t a;
    uint32_t w;
  };

  static __device__ __forceinline__ LaneAddresses lane_addresses(int lane, int warp_m, int warp_n,
                                                                 int warp_k) {
    const int place = lane % 8;
    LaneAddresses at;
    const int a_row = warp_k * kTile.block_m + warp_m * kTile.warp_m() + place + 8 * (lane / 8 % 2);
    const int a_chunk = (lane / 16) ^ place;
    const int w_row = warp_k * kTile.block_n + warp_n * kTile.warp_n() + 8 * (place / 2) +
                      2 * (lane / 16) + place % 2;
    const int w_chunk = (lane / 8 % 2) ^ place;
    at.a = static_cast<uint32_t>(a_row * kRowBytes + a_chunk * 16);
    at.w = static_cast<uint32_t>(kABytes + w_row * kRowBytes + w_chunk * 16);
    ptx::keep_in_register(at.a);
    ptx::keep_in_register(at.w);
    return at;
  }

  // Step s covers chunks 2 s and 2 s + 1: the place differs from step 0's in bits 5 and 6 alone.
  static __device__ __forceinline__ void load_fragments(Fragments& f, uint32_t stage,
                                                        const LaneAddresses& lane, int step) {
    const uint32_t a = stage + (lane.a ^ (step * 32));
    const uint32_t w = stage + (lane.w ^ (step * 32));
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) ptx::ldmatrix_x4(f.a[i], a + i * 16 * kRowBytes);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        ptx::ldmatrix_x4(f.w[g][pair], w + (g * 32 + pair * 4) * kRowBytes);
      }
    }
  }

  using Accumulators = int32_t[kMTiles][kGroups * 4][4];

  // Rows of m16 tiles [kFirst, kLast).
  template <int kFirst, int kLast>
  static __device__ __forceinline__ void multiply(Accumulators& acc, const Fragments& f) {
#pragma unroll
    for (int i = kFirst; i < kLast; ++i) {
#pragma unroll
      for (int j = 0; j < kGroups * 4; ++j) {
        const uint32_t (&w)[4] = f.w[j / 4][j % 4 / 2];
        ptx::mma_m16n8k32_s8(acc[i][j], f.a[i], w[j % 2 * 2], w[j % 2 * 2 + 1]);
      }
    }
  }

  // Adds the K-warps' sums into K-warp 0's. Every stage has been read when this is called.
  static __device__ __forceinline__ void reduce_k_warps(Accumulators& acc, uint8_t* shared,
                                                        int warp_k, int warp_mn, int lane) {
    constexpr int kWords = kMTiles * kGroups * 16;
    constexpr int kWarpsMN = kTile.warps_m * kTile.warps_n;
    auto* sums = reinterpret_cast<int32_t*>(shared);
    const auto slot = [&](int k, int word) {
      return (((k - 1) * kWarpsMN + warp_mn) * kWords + word) * 32 + lane;
    };
    __syncthreads();
    auto& flat = reinterpret_cast<int32_t (&)[kWords]>(acc);
    if (warp_k > 0) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) sums[slot(warp_k, i)] = flat[i];
    }
    __syncthreads();
    if (warp_k == 0) {
#pragma unroll
      for (int k = 1; k < kTile.warps_k; ++k) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) flat[i] += sums[slot(k, i)];
      }
    }
  }

  // The block's tile starts at (m_first, n_first) of the output, the warp's part at (tile_m,
  // tile_n) of the tile.
  template <DType kOut, bool kVector>
  static __device__ __forceinline__ void store(const Accumulators& acc,
                                               const ScaleEpilogue& epilogue,
                                               const Factors& factors, int32_t m_first,
                                               int32_t n_first, int tile_m, int tile_n, int lane) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int tile_col = tile_n + g * 32 + lane % 4 * 8;
      const auto columns = factors.columns(tile_col);
#pragma unroll
      for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int32_t row_acc[8];
#pragma unroll
          for (int e = 0; e < 8; ++e) row_acc[e] = acc[i][g * 4 + e / 2][half * 2 + e % 2];
          const int tile_row = tile_m + i * 16 + half * 8 + lane / 4;
          epilogue.store_x8<kOut, kVector>(m_first + tile_row, n_first + tile_col, row_acc,
                                           factors.a_scale[tile_row], columns);
        }
      }
    }
  }

  static __device__ __forceinline__ void run(GemmArgs args) {
    extern __shared__ __align__(128) uint8_t shared[];
    ptx::grid_dependency_wait();
    ptx::grid_dependency_trigger();

    // Tiles in groups of kGroupM rows of tiles, column by column within a group: the blocks in
    // flight then share few rows of a and of w, and L2 serves the repeats.
    constexpr int32_t kGroupM = 8;
    const int32_t tile = static_cast<int32_t>(blockIdx.x);
    const int32_t group = tile / (kGroupM * args.n_tiles);
    const int32_t group_rows = min(kGroupM, args.m_tiles - group * kGroupM);
    const int32_t in_group = tile - group * kGroupM * args.n_tiles;
    const int32_t m_first = (group * kGroupM + in_group % group_rows) * kTile.block_m;
    const int32_t n_first = in_group / group_rows * kTile.block_n;

    const int32_t split = static_cast<int32_t>(blockIdx.y);
    const int32_t k_blocks = (args.k + kTile.block_k() - 1) / kTile.block_k();
    const int32_t k_begin = split * args.k_blocks_per_split;
    const int32_t count = min(args.k_blocks_per_split, k_blocks - k_begin);

    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int warp_m = warp % kTile.warps_m;
    const int warp_n = warp / kTile.warps_m % kTile.warps_n;
    const int warp_k = warp / (kTile.warps_m * kTile.warps_n);
    const LaneAddresses addresses = lane_addresses(lane, warp_m, warp_n, warp_k);
    const uint32_t shared_base = ptx::shared_address(shared);

    StageLoader loader(args, m_first, n_first,
                       k_begin * kTile.block_k() + threadIdx.x % kChunksPerRow * 16);

    // Prologue: kStages - 1 K-blocks under way. A group is committed even where nothing was left to
    // load, so that "at most kStages - 2 groups pending" always means "the next block is here".
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < count) {
        loader.template load<0, 1>(shared + s * kTile.stage_bytes());
        loader.next_k_block();
      }
      ptx::cp_async_commit_group();
    }
    // Their latency passes beside that of the first K-blocks; the barrier publishes both.
    __shared__ Factors factors;
    factors.fetch(args.epilogue, m_first, n_first, kThreads);
    ptx::cp_async_wait_group<kStages - 2>();
    __syncthreads();

    Accumulators acc = {};
    Fragments fragments[2];
    load_fragments(fragments[0], shared_base, addresses, 0);

    int read_stage = 0;
    int write_stage = kStages - 1;
    for (int32_t b = 0; b < count; ++b) {
      const int next_stage = read_stage + 1 == kStages ? 0 : read_stage + 1;
      // The stage written in this round was read in round b - 1, which every warp has left behind.
      const bool more = b + kStages - 1 < count;
      const auto run_step = [&]<int kStep>() {
        if (more) {
          loader.template load<kStep, kSteps>(shared + write_stage * kTile.stage_bytes());
        }
        if constexpr (kStep + 1 < kSteps) {
          load_fragments(fragments[(kStep + 1) % 2], shared_base + read_stage * kTile.stage_bytes(),
                         addresses, kStep + 1);
        } else {
          ptx::cp_async_commit_group();
          // Half of the products before the barrier, half after: the tensor cores have work while
          // the block's warps meet and while the next fragments arrive.
          multiply<0, kMTiles / 2>(acc, fragments[kStep % 2]);
          if (b + 1 < count) {
            ptx::cp_async_wait_group<kStages - 2>();
            __syncthreads();
            load_fragments(fragments[0], shared_base + next_stage * kTile.stage_bytes(), addresses,
                           0);
          }
        }
        multiply<kStep + 1 < kSteps ? 0 : kMTiles / 2, kMTiles>(acc, fragments[kStep % 2]);
      };
      run_step.template operator()<0>();
      run_step.template operator()<1>();
      run_step.template operator()<2>();
      run_step.template operator()<3>();
      loader.next_k_block();
      write_stage = read_stage;
      read_stage = next_stage;
    }

    if constexpr (kTile.warps_k > 1) {
      reduce_k_warps(acc, shared, warp_k, warp % (kTile.warps_m * kTile.warps_n), lane);
      if (warp_k != 0) return;
    }
    if (gridDim.y > 1) {
      // A split's sums go to a slab of its own.
      args.epilogue.out =
          static_cast<int32_t*>(args.epilogue.out) + static_cast<int64_t>(split) * args.m * args.n;
    }
    args.epilogue.with_out_dtype([&]<DType kOut, bool kVector>() {
      store<kOut, kVector>(acc, args.epilogue, factors, m_first, n_first, warp_m * kTile.warp_m(),
                           warp_n * kTile.warp_n(), lane);
    });
  }
};

// By index: nvcc's host stubs cannot spell a template argument of class type.
template <int kTileIndex, bool kAligned>
__global__ void __launch_bounds__(kGemmTiles[kTileIndex].threads(),
                                  kGemmTiles[kTileIndex].blocks_per_sm)
    gemm_kernel(const __grid_constant__ GemmArgs args) {
  GemmKernel<kGemmTiles[kTileIndex], kAligned>::run(args);
}

// Launches one tile; splits > 1 writes partial sums (args.epilogue then is raw).
template <int kTileIndex>
void launch_gemm(const GemmArgs& args, bool aligned, int32_t splits, const ExecContext& ctx) {
  constexpr GemmTile kTile = kGemmTiles[kTileIndex];
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(args.m_tiles) * static_cast<unsigned>(args.n_tiles),
                    static_cast<unsigned>(splits));
  shape.block = dim3(kTile.threads());
  const int32_t used_stages =
      args.k_blocks_per_split < kTile.stages ? args.k_blocks_per_split : kTile.stages;
  shape.shared_bytes = static_cast<size_t>(kTile.shared_bytes(used_stages));
  if (aligned) {
    launch<gemm_kernel<kTileIndex, true>>("sm80 GEMM", shape, ctx, args);
  } else {
    launch<gemm_kernel<kTileIndex, false>>("sm80 GEMM, unaligned rows", shape, ctx, args);
  }
}

}  // namespace int8_ops::cuda::sm80
