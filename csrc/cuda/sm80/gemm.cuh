// The mma.sync GEMM kernel. A block computes output tiles, each of one split of K, one by one:
//
//   global --cp.async--> shared stages --ldmatrix--> fragments --mma--> sums --epilogue--> global
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

#include <utility>

#include "../../common/params.h"
#include "../epilogue/scale_epilogue.cuh"
#include "../heuristics/gemm_tiles.h"
#include "../launch.cuh"
#include "../ptx/cp_async.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/ldmatrix.cuh"
#include "../ptx/mma_s8.cuh"
#include "gemm_args.cuh"
#include "stage_loader.cuh"

namespace int8_ops::cuda::sm80 {

// kAligned: every row of a and w starts 16-byte aligned, so that cp.async can move it.
template <GemmTile kTile, bool kAligned>
struct GemmKernel {
  static constexpr int kRowBytes = GemmTile::kRowBytes;
  static constexpr int kStages = kTile.stages;
  static constexpr int kThreads = kTile.threads();
  static constexpr int kMTiles = kTile.warp_m() / 16;
  static constexpr int kGroups = kTile.warp_n() / 32;  // groups of four n8 tiles
  static constexpr int kSteps = kRowBytes / 32;        // k32 steps of a row
  static constexpr int kMeet = kMTiles / 2;            // where in the last step the warps meet
  static constexpr int kABytes = kTile.block_m * kTile.block_k();

  using Factors = EpilogueFactors<kTile.block_m, kTile.block_n>;
  using Loader = StageLoader<kTile, kAligned>;

  static_assert(kTile.warp_m() % 16 == 0 && kTile.warp_n() % 32 == 0,
                "a warp computes whole m16 tiles and whole groups of 32 columns");
  static_assert(2 * sizeof(Factors) == kTile.factor_bytes() && sizeof(Factors) % 128 == 0,
                "the stages after the factors keep the alignment that the swizzle counts on");
  static_assert(kSteps == 4, "multiply_tile() spells its four steps out");
  static_assert(kStages >= 2, "a stage is loaded while another is read");

  struct Fragments {
    uint32_t a[kMTiles][4];
    uint32_t w[kGroups][2][4];  // two pairs of n8 tiles a group
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

  // Part kPart of kParts of the fragments of a step. Step s covers chunks 2 s and 2 s + 1: the
  // place differs from step 0's in bits 5 and 6 alone.
  template <int kPart, int kParts>
  static __device__ __forceinline__ void load_fragments(Fragments& f, uint32_t stage,
                                                        const LaneAddresses& lane, int step) {
    const uint32_t a = stage + (lane.a ^ (step * 32));
    const uint32_t w = stage + (lane.w ^ (step * 32));
#pragma unroll
    for (int i = kMTiles * kPart / kParts; i < kMTiles * (kPart + 1) / kParts; ++i) {
      ptx::ldmatrix_x4(f.a[i], a + i * 16 * kRowBytes);
    }
    constexpr int kPairs = kGroups * 2;
#pragma unroll
    for (int p = kPairs * kPart / kParts; p < kPairs * (kPart + 1) / kParts; ++p) {
      ptx::ldmatrix_x4(f.w[p / 2][p % 2], w + (p / 2 * 32 + p % 2 * 4) * kRowBytes);
    }
  }

  using Accumulators = int32_t[kMTiles][kGroups * 4][4];

  static __device__ __forceinline__ void multiply(Accumulators& acc, const Fragments& f, int i) {
#pragma unroll
    for (int j = 0; j < kGroups * 4; ++j) {
      const uint32_t (&w)[4] = f.w[j / 4][j % 4 / 2];
      ptx::mma_m16n8k32_s8(acc[i][j], f.a[i], w[j % 2 * 2], w[j % 2 * 2 + 1]);
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

  // One output tile of one split.
  struct Work {
    int32_t m_first;
    int32_t n_first;
    int32_t split;
    int32_t k_begin;  // in K-blocks
    int32_t k_count;
  };

  // Tiles in groups of kGroupM rows of tiles, column by column within a group: the blocks in flight
  // then share few rows of a and of w, and L2 serves the repeats.
  static __device__ __forceinline__ Work work_at(const GemmArgs& args, int32_t index) {
    constexpr int32_t kGroupM = 8;
    const int32_t tiles = args.m_tiles * args.n_tiles;
    Work work;
    work.split = index / tiles;
    const int32_t tile = index - work.split * tiles;
    const int32_t group = tile / (kGroupM * args.n_tiles);
    const int32_t group_rows = min(kGroupM, args.m_tiles - group * kGroupM);
    const int32_t in_group = tile - group * kGroupM * args.n_tiles;
    work.m_first = (group * kGroupM + in_group % group_rows) * kTile.block_m;
    work.n_first = in_group / group_rows * kTile.block_n;
    const int32_t k_blocks = (args.k + kTile.block_k() - 1) / kTile.block_k();
    work.k_begin = work.split * args.k_blocks_per_split;
    work.k_count = min(args.k_blocks_per_split, k_blocks - work.k_begin);
    return work;
  }

  // Starts the copies of a tile's first kStages - 1 K-blocks and of its factors. A group is
  // committed even where nothing was left to load, so that "at most kStages - 2 groups pending"
  // always means "the next K-block is here".
  static __device__ __forceinline__ void begin(const GemmArgs& args, const Work& work,
                                               Loader& loader, Factors& factors, uint8_t* shared) {
    loader.begin(args, work.m_first, work.n_first, work.k_begin);
    factors.fetch(args.epilogue, work.m_first, work.n_first, kThreads);
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < work.k_count) {
        loader.template load<0, 1>(shared + s * kTile.stage_bytes());
        loader.next_k_block();
      }
      ptx::cp_async_commit_group();
    }
  }

  // The products of one tile. begin() was called for it.
  static __device__ __forceinline__ void multiply_tile(Accumulators& acc, int32_t k_count,
                                                       Loader& loader, uint8_t* shared,
                                                       const LaneAddresses& addresses) {
    const uint32_t shared_base = ptx::shared_address(shared);
    ptx::cp_async_wait_group<kStages - 2>();
    __syncthreads();
    Fragments fragments[2];
    load_fragments<0, 1>(fragments[0], shared_base, addresses, 0);

    int read_stage = 0;
    int write_stage = kStages - 1;
    for (int32_t b = 0; b < k_count; ++b) {
      const int next_stage = read_stage + 1 == kStages ? 0 : read_stage + 1;
      const uint32_t read = shared_base + read_stage * kTile.stage_bytes();
      const uint32_t next = shared_base + next_stage * kTile.stage_bytes();
      // The stage written in this round was read in round b - 1, which every warp has left behind.
      const bool more = b + kStages - 1 < k_count;
      // Between the products of one m16 row and the next: a share of the next step's fragments, so
      // that the load unit's queue neither fills nor runs dry.
      const auto run_step = [&]<int kStep, int... kRow>(std::integer_sequence<int, kRow...>) {
        const Fragments& now = fragments[kStep % 2];
        Fragments& then = fragments[(kStep + 1) % 2];
        const auto run_row = [&]<int kI>() {
          // Before the warps meet: the wait there counts this round's group.
          if constexpr (kI == 0) {
            if (more) {
              loader.template load<kStep, kSteps>(shared + write_stage * kTile.stage_bytes());
            }
            if constexpr (kStep + 1 == kSteps) ptx::cp_async_commit_group();
          }
          if constexpr (kStep + 1 < kSteps) {
            load_fragments<kI, kMTiles>(then, read, addresses, kStep + 1);
          } else if constexpr (kI >= kMeet) {
            // Half of the last step's products come before the barrier, half after: the tensor
            // cores have work while the block's warps meet.
            if (b + 1 < k_count) {
              if constexpr (kI == kMeet) {
                ptx::cp_async_wait_group<kStages - 2>();
                __syncthreads();
              }
              load_fragments<kI - kMeet, kMTiles - kMeet>(then, next, addresses, 0);
            }
          }
          multiply(acc, now, kI);
        };
        (run_row.template operator()<kRow>(), ...);
      };
      constexpr auto kRows = std::make_integer_sequence<int, kMTiles>{};
      run_step.template operator()<0>(kRows);
      run_step.template operator()<1>(kRows);
      run_step.template operator()<2>(kRows);
      run_step.template operator()<3>(kRows);
      loader.next_k_block();
      write_stage = read_stage;
      read_stage = next_stage;
    }
  }

  static __device__ __forceinline__ void run(const GemmArgs& args) {
    extern __shared__ __align__(128) uint8_t storage[];
    auto* const factors = reinterpret_cast<Factors*>(storage);
    uint8_t* const shared = storage + kTile.factor_bytes();
    ptx::grid_dependency_wait();

    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    const int warp_m = warp % kTile.warps_m;
    const int warp_n = warp / kTile.warps_m % kTile.warps_n;
    const int warp_k = warp / (kTile.warps_m * kTile.warps_n);
    const LaneAddresses addresses = lane_addresses(lane, warp_m, warp_n, warp_k);

    // A block works on tile after tile: the first K-blocks of the next tile are under way while the
    // epilogue stores this one.
    const int32_t works = args.m_tiles * args.n_tiles * args.splits;
    int32_t index = static_cast<int32_t>(blockIdx.x);
    int slot = 0;  // of the factors
    Loader loader;
    Work work = work_at(args, index);
    begin(args, work, loader, factors[slot], shared);
    while (true) {
      Accumulators acc = {};
      multiply_tile(acc, work.k_count, loader, shared, addresses);
      __syncthreads();  // every warp has read its last fragments
      if constexpr (kTile.warps_k > 1) {
        reduce_k_warps(acc, shared, warp_k, warp % (kTile.warps_m * kTile.warps_n), lane);
        __syncthreads();
      }
      const Work done = work;
      index += static_cast<int32_t>(gridDim.x);
      if (index < works) {
        work = work_at(args, index);
        begin(args, work, loader, factors[slot ^ 1], shared);
      } else {
        ptx::grid_dependency_trigger();
      }
      if (warp_k == 0) {
        ScaleEpilogue epilogue = args.epilogue;
        if (args.splits > 1) {
          // A split's sums go to a slab of its own.
          epilogue.out = static_cast<int32_t*>(epilogue.out) +
                         static_cast<int64_t>(done.split) * args.m * args.n;
        }
        epilogue.with_out_dtype([&]<DType kOut, bool kVector>() {
          store<kOut, kVector>(acc, epilogue, factors[slot], done.m_first, done.n_first,
                               warp_m * kTile.warp_m(), warp_n * kTile.warp_n(), lane);
        });
      }
      if (index >= works) return;
      slot ^= 1;
    }
  }
};

// By index: nvcc's host stubs cannot spell a template argument of class type.
template <int kTileIndex, bool kAligned>
__global__ void __launch_bounds__(kGemmTiles[kTileIndex].threads(),
                                  kGemmTiles[kTileIndex].blocks_per_sm)
    gemm_kernel(const __grid_constant__ GemmArgs args) {
  GemmKernel<kGemmTiles[kTileIndex], kAligned>::run(args);
}

// Launches one tile on as many blocks as run at once; args.splits > 1 writes partial sums
// (args.epilogue then is raw).
template <int kTileIndex>
void launch_gemm(const GemmArgs& args, bool aligned, int32_t sm_count, const ExecContext& ctx) {
  constexpr GemmTile kTile = kGemmTiles[kTileIndex];
  LaunchShape shape;
  const int32_t works = args.m_tiles * args.n_tiles * args.splits;
  const int32_t resident = sm_count * kTile.blocks_per_sm;
  shape.grid = dim3(static_cast<unsigned>(works < resident ? works : resident));
  shape.block = dim3(kTile.threads());
  const int32_t used_stages =
      args.k_blocks_per_split < kTile.stages ? args.k_blocks_per_split : kTile.stages;
  shape.shared_bytes = static_cast<size_t>(kTile.shared_bytes(used_stages));
  if (aligned) {
    launch<gemm_kernel<kTileIndex, true>>("sm80 GEMM", shape, ctx, args);
  } else if constexpr (kTile.serves_unaligned()) {
    launch<gemm_kernel<kTileIndex, false>>("sm80 GEMM, unaligned rows", shape, ctx, args);
  } else {
    throw std::logic_error("int8_ops: the plan names a tile that takes no unaligned rows");
  }
}

}  // namespace int8_ops::cuda::sm80
