// The Hopper kernel for short K and few columns: w stays in shared memory, rows of a pass by.
//
//   w --copy engine, once--> slab \
//                                  > --wgmma--> sums --epilogue--> global
//   x --quantize--> a share of a tile of rows --copy engine--> the tile's buffers
//   or a --copy engine, a share to all blocks of the cluster-> the tile's buffers
//
// The blocks of a cluster hold neighbouring slabs of columns and multiply the same tiles of rows.
// Each brings a share of every tile and copies it into the shared memory of all: x is read and
// quantized once, and L2 delivers neither x nor w a second time.
//
// A block has two warpgroups that take its tiles of columns in turn: while one multiplies, the
// other scales and stores. A third quantizes, or its first thread drives the copy engine.
#pragma once

#include "../heuristics/sm90_tiles.h"
#include "../launch.cuh"
#include "../ptx/cluster.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/tma.cuh"
#include "gemm_args.cuh"
#include "ring.cuh"
#include "row_round.cuh"
#include "warpgroup_tile.cuh"

namespace int8_ops::cuda::sm90 {

template <Source kSource, DType kOut>
struct StationaryKernel {
  static_assert(kSource != Source::kFloat32, "such rows do not fit the quantizing threads");
  static constexpr bool kQuantizes = kSource != Source::kInt8;
  static constexpr int kBlockM = StationaryTile::kBlockM;
  static constexpr int kBlockN = StationaryTile::kBlockN;
  static constexpr int kBoxBytes = kBlockN * kBlockK;  // of the slab
  static constexpr int kRowsBoxBytes = kBlockM * kBlockK;
  static constexpr int kWarpRows = 16;
  static constexpr int kStagedBytes = kWarpRows * 128;
  static constexpr int kStagedBoxes = StationaryTile::kStagedBoxes;
  // Of 168 a thread at entry.
  static constexpr uint32_t kProducerRegisters = kQuantizes ? 136 : 40;
  static constexpr uint32_t kConsumerRegisters = kQuantizes ? 184 : 232;

  static constexpr uint32_t kTurnBarrier = 1;  // and the next, one a warpgroup
  static constexpr uint32_t kPairBarrier = 3;  // and the next

  using Tile = WarpgroupTile<kBlockN, 64>;

  struct Head {
    StageBarriers<StationaryTile::kMaxRowBuffers> rows;
    alignas(8) uint64_t slab[StationaryTile::kMaxSlabBoxes];
  };
  static_assert(sizeof(Head) <= StationaryTile::kHeadBytes);

  const GemmArgs& args;
  uint32_t slab;  // [n_tiles][k_blocks][kBlockN][128]
  uint8_t* rows;  // [row_buffers][k_blocks][64][128]; quantized: [row_buffers][8][k_blocks][8][128]
  uint32_t staging;  // [8 warps][kStagedBoxes][16][128]
  float* w_scales;   // [n_tiles][kBlockN]
  float* bias;       // [n_tiles][kBlockN]
  float* scales;     // [row_buffers][64]
  uint32_t slab_full;
  RingBarriers ring;
  uint32_t cluster;
  uint32_t rank;       // of this block in its cluster
  int32_t n_tiles;     // of this block, that begin within n
  int32_t n_first;     // of this block
  int32_t first_tile;  // of rows
  int32_t tile_step;

  __device__ __forceinline__ uint32_t rows_bytes() const {
    return static_cast<uint32_t>(args.k_blocks) * kRowsBoxBytes;
  }
  __device__ __forceinline__ int32_t share_rows() const {
    return kBlockM / static_cast<int32_t>(cluster);
  }

  // ---- one thread: what the copy engine brings
  // ---------------------------------------------------

  __device__ __forceinline__ void load_slab() const {
    for (int32_t t = 0; t < n_tiles; ++t) {
      for (int32_t b = 0; b < args.k_blocks; ++b) {
        const int32_t box = t * args.k_blocks + b;
        ptx::mbarrier_arrive_expect_tx(slab_full + box * 8, kBoxBytes);
        ptx::tma_load_2d(slab + box * kBoxBytes, &args.w_map, slab_full + box * 8, b * kBlockK,
                         n_first + t * kBlockN);
      }
    }
  }

  __device__ __forceinline__ void load_rows() const {
    const auto share = static_cast<int32_t>(rank) * share_rows();
    const auto everyone = static_cast<uint16_t>((1U << cluster) - 1);
    RingPlace at;
    for (int32_t tile = first_tile; tile < args.m_tiles; tile += tile_step) {
      ring.wait_empty(at);
      const uint32_t full = ring.full_at(at);
      ptx::mbarrier_arrive_expect_tx(full, rows_bytes());
      const uint32_t to = ptx::shared_address(rows) + at.stage * rows_bytes() + share * kBlockK;
      for (int32_t b = 0; b < args.k_blocks; ++b) {
        const int32_t row = tile * kBlockM + share;
        if (cluster == 1) {
          ptx::tma_load_2d(to + b * kRowsBoxBytes, &args.a_map, full, b * kBlockK, row);
        } else {
          ptx::tma_load_2d_multicast(to + b * kRowsBoxBytes, &args.a_map, full, everyone,
                                     b * kBlockK, row);
        }
      }
      at.next(args.stages);
    }
  }

  // ---- a warpgroup: quantizes this block's share of every tile
  // ---------------------------------------------------

  // Eight rows of all K-blocks lie together, so that they go to another block in one piece.
  __device__ __forceinline__ uint32_t group_bytes() const {
    return static_cast<uint32_t>(args.k_blocks) * 8 * kBlockK;
  }

  // `groups` groups of eight rows from `first_row` on go from here to the other blocks, and their
  // scales: two copies a block, by a lane each.
  __device__ __forceinline__ void send(const RingPlace& at, int32_t first_row,
                                       uint32_t groups) const {
    const uint32_t lane = threadIdx.x % 32;
    if (lane >= 2 * (cluster - 1)) return;
    uint32_t peer = rank + 1 + lane / 2;
    if (peer >= cluster) peer -= cluster;
    const bool scale = lane % 2 != 0;
    const uint32_t from = scale ? ptx::shared_address(scales + at.stage * kBlockM + first_row)
                                : ptx::shared_address(rows) + at.stage * rows_bytes() +
                                      static_cast<uint32_t>(first_row) / 8 * group_bytes();
    ptx::bulk_copy_to_block(ptx::shared_of_block(from, peer), from,
                            groups * (scale ? 32 : group_bytes()),
                            ptx::shared_of_block(ring.full_at(at), peer));
  }

  // What the other blocks send of a tile.
  __device__ __forceinline__ uint32_t received_bytes() const {
    return static_cast<uint32_t>(kBlockM - share_rows()) *
           (static_cast<uint32_t>(args.k_blocks) * kBlockK + 4);
  }

  // Sixteen chunks a K-block; two make sixteen bytes, whose place is swizzled.
  __device__ __forceinline__ uint2* place_of(const RingPlace& at, int32_t row,
                                             int32_t chunk) const {
    const int32_t sixteen = (chunk % 16 / 2) ^ (row % 8);
    return reinterpret_cast<uint2*>(rows + at.stage * rows_bytes() + row / 8 * group_bytes() +
                                    chunk / 16 * (8 * kBlockK) + row % 8 * kBlockK + sixteen * 16 +
                                    chunk % 2 * 8);
  }

  // Rare rows, read again: little code, and no registers.
  template <typename Round, typename T>
  __device__ __forceinline__ void divide_rows(const RingPlace& at, const T* x, int32_t tile_row,
                                              int32_t share, uint32_t to_divide) const {
    __syncwarp();  // the scales are written
#pragma unroll 1
    for (; to_divide != 0; to_divide &= to_divide - 1) {
      const int32_t row = share + Round::row_in_round(__ffs(static_cast<int>(to_divide)) - 1);
      const float divisor = scales[at.stage * kBlockM + row];
#pragma unroll 1
      for (int32_t chunk = Round::lane(); chunk * kChunk < args.k; chunk += Round::kRowLanes) {
        Chunk<T> values;
        values.load(x + int64_t{tile_row + row} * args.k + chunk * kChunk);
        *place_of(at, row, chunk) = quantize_chunk_by_division(values, {divisor, divisor, -1.0F});
      }
    }
  }

  // A warp's rows of a tile lie in its registers; the next tile's are loaded meanwhile.
  template <typename T, int kLanes, int kChunks, int kPasses>
  __device__ __forceinline__ void quantize_rows(int warp) const {
    using Round = RowRound<T, kLanes, kChunks, kPasses>;
    const auto* const x = static_cast<const T*>(args.x);
    const int32_t share = static_cast<int32_t>(rank) * share_rows() + warp * Round::kRows;
    const auto load = [&](Round& round, int32_t tile) {
      round.template load<false>(x, min(tile, args.m_tiles) * kBlockM + share, args.m, args.k,
                                 args.k);
    };
    RingPlace at;
    Round now;
    load(now, first_tile);
#pragma unroll 1
    for (int32_t tile = first_tile; tile < args.m_tiles; tile += tile_step) {
      Round next;
      load(next, tile + tile_step);
      prefetch(tile + 2 * tile_step, share, Round::kRows, sizeof(T));
      float scale = 0.0F;
      const auto factors = now.find_factors([&](int32_t, float value) { scale = value; });
      uint2 q[kPasses][kChunks];
      const uint32_t to_divide = now.quantize(factors, q);
      ring.wait_empty(at);
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
          const int32_t chunk = Round::chunk_of(i);
          if (chunk / 16 < args.k_blocks) {
            *place_of(at, share + Round::row_in_round(p), chunk) = q[p][i];
          }
        }
      }
      if (Round::lane() < kPasses) {
        scales[at.stage * kBlockM + share + Round::row_in_round(Round::lane())] = scale;
      }
      if (__any_sync(0xffffffffu, to_divide != 0)) {
        divide_rows<Round>(at, x, tile * kBlockM, share, to_divide);
      }
      ptx::fence_proxy_async();
      if (threadIdx.x % kWarpgroupThreads == 0) {
        ptx::mbarrier_arrive_expect_tx(ring.full_at(at), received_bytes());
      }
      ptx::mbarrier_arrive(ring.full_at(at));
      if constexpr (Round::kRows >= 8) {
        __syncwarp();
        send(at, share, Round::kRows / 8);
      } else {
        // Two warps make a group.
        static_assert(Round::kRows == 4);
        ptx::named_barrier_sync(kPairBarrier + warp / 2, 64);
        if (warp % 2 == 0) send(at, share, 1);
      }
      at.next(args.stages);
      now = next;
    }
  }

  // These rows of a tile come to L2.
  __device__ __forceinline__ void prefetch(int32_t tile, int32_t share, int32_t count,
                                           int32_t size) const {
    if (threadIdx.x % 32 != 0 || tile >= args.m_tiles) return;
    const int32_t row = tile * kBlockM + share;
    if (row >= args.m) return;
    const auto* const from = static_cast<const uint8_t*>(args.x) + int64_t{row} * args.k * size;
    ptx::prefetch_l2_bulk(from, static_cast<uint32_t>(min(count, args.m - row) * args.k * size));
  }

  template <typename T>
  __device__ __forceinline__ void quantize_all(int warp) const {
    const uint32_t c = cluster;
    if (args.k_blocks == 1) {
      if (c == 1) return quantize_rows<T, 16, 1, 8>(warp);
      if (c == 2) return quantize_rows<T, 16, 1, 4>(warp);
      return quantize_rows<T, 16, 1, 2>(warp);
    }
    if (args.k_blocks == 2) {
      if (c == 2) return quantize_rows<T, 32, 1, 8>(warp);
      return quantize_rows<T, 32, 1, 4>(warp);
    }
    quantize_rows<T, 32, 2, 4>(warp);
  }

  // ---- two warpgroups: multiply, scale, store
  // ----------------------------------------------------

  // Scales and bias of the slab's columns, by all threads of both. Without a bias -0 is added,
  // which changes nothing, not even a -0.
  __device__ __forceinline__ void load_columns() const {
    const ScaleEpilogue& e = args.epilogue;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < n_tiles * kBlockN;
         i += 2 * kWarpgroupThreads) {
      const int32_t col = n_first + i;
      const bool in = col < e.n && kOut != DType::kInt32;
      w_scales[i] = in ? e.w_scale[col] : 0.0F;
      bias[i] = in && e.bias != nullptr ? load_float(e.bias, e.bias_dtype, col) : -0.0F;
    }
    ptx::named_barrier_sync(kTurnBarrier, 2 * kWarpgroupThreads);
  }

  // `mine` is this warpgroup's next tile of columns, counted over all rows, `others` how many the
  // other one has in all.
  __device__ __forceinline__ void take_turn(int warpgroup, int32_t mine, int32_t others) const {
    const int32_t before = warpgroup == 0 ? mine - 1 : mine;
    if (before >= 0 && before < others) {
      ptx::named_barrier_sync(kTurnBarrier + warpgroup, 2 * kWarpgroupThreads);
    }
  }
  __device__ __forceinline__ void give_turn(int warpgroup, int32_t mine, int32_t others) const {
    const int32_t after = warpgroup == 0 ? mine : mine + 1;
    if (after < others) {
      ptx::named_barrier_arrive(kTurnBarrier + (warpgroup ^ 1), 2 * kWarpgroupThreads);
    }
  }

  // Four lanes of a warp read the scales of its rows, and the same four free the buffer. Every
  // warpgroup waits for every buffer and frees it, whether or not it had use for it.
  static constexpr uint32_t kFreeing = 4;

  __device__ __forceinline__ void read_scales(const RingPlace& at, float (&row_scale)[2]) const {
    const int lane = threadIdx.x % 32;
    float4 four = {};
    if (lane < kFreeing) {
      const int32_t first = at.stage * kBlockM + threadIdx.x / 32 % 4 * kWarpRows;
      four = *reinterpret_cast<const float4*>(&scales[first + lane * 4]);
    }
    // Row lane / 4 is in lane / 16; the one eight below, two lanes on.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int from = lane / 16 + half * 2;
      const float x = __shfl_sync(0xffffffffu, four.x, from);
      const float y = __shfl_sync(0xffffffffu, four.y, from);
      const float z = __shfl_sync(0xffffffffu, four.z, from);
      const float w = __shfl_sync(0xffffffffu, four.w, from);
      const int in_four = lane / 4 % 4;
      row_scale[half] = in_four < 2 ? (in_four == 0 ? x : y) : (in_four == 2 ? z : w);
    }
  }

  __device__ __forceinline__ void free_rows(const RingPlace& at) const {
    const uint32_t lane = threadIdx.x % 32;
    if (lane >= kFreeing) return;
    if (cluster == 1) return ptx::mbarrier_arrive(ring.empty_at(at));
    for (uint32_t block = 0; block < cluster; ++block) {
      ptx::mbarrier_arrive_cluster(ring.empty_at(at), block);
    }
  }

  __device__ __forceinline__ void consume(int warpgroup) const {
    load_columns();
    const int32_t tiles =
        first_tile < args.m_tiles ? (args.m_tiles - first_tile + tile_step - 1) / tile_step : 0;
    const int32_t others = (tiles * n_tiles + warpgroup) / 2;
    const uint64_t rows_at =
        ptx::wgmma_descriptor(ptx::shared_address(rows), kQuantizes ? group_bytes() : 8 * kBlockK);
    const uint32_t k_step = (kQuantizes ? 8 * kBlockK : kRowsBoxBytes) >> 4;
    const uint64_t slab_at = ptx::wgmma_descriptor(slab);
    const uint32_t my_staging = staging + threadIdx.x / 32 * (kStagedBoxes * kStagedBytes);
    RingPlace at;
    int32_t mine = 0;
    int32_t t = warpgroup;  // this warpgroup's next tile of columns
    typename Tile::Sums sums;
    for (int32_t i = 0; i < tiles; ++i) {
      const int32_t row_first = (first_tile + i * tile_step) * kBlockM;
      TilePlace place{row_first, 0, {0.0F, 0.0F}};
      if constexpr (!kQuantizes) {
        for (int half = 0; half < 2; ++half) {
          const int32_t row = row_first + Tile::row_of_thread() + half * 8;
          if (args.epilogue.a_scale != nullptr && row < args.m) {
            place.row_scale[half] = args.epilogue.a_scale[row];
          }
        }
      }
      ring.wait_full(at);
      if (kQuantizes && t < n_tiles) read_scales(at, place.row_scale);
      if (i + 1 == tiles) ptx::grid_dependency_trigger();
      const uint64_t a = rows_at + at.stage * (rows_bytes() >> 4);
      if (t >= n_tiles) free_rows(at);
      for (; t < n_tiles; t += 2, ++mine) {
        take_turn(warpgroup, mine, others);
        for (int32_t b = 0; b < args.k_blocks; ++b) {
          const int32_t box = t * args.k_blocks + b;
          if (mine < n_tiles) ptx::mbarrier_wait_parity(slab_full + box * 8, 0);
          Tile::multiply(sums, a + b * k_step, slab_at + box * (kBoxBytes >> 4), b != 0);
        }
        if (args.k_blocks > 1) ptx::wgmma_wait_group<1>();
        give_turn(warpgroup, mine, others);
        ptx::wgmma_wait_group<0>();
        ptx::wgmma_touch(sums);
        if (t + 2 >= n_tiles) free_rows(at);
        place.n_first = n_first + t * kBlockN;
        store(sums, place, t * kBlockN, my_staging);
      }
      t -= n_tiles;
      at.next(args.stages);
    }
  }

  // Of kCount groups of eight columns from `first` on.
  template <int kCount, bool kBias>
  __device__ __forceinline__ ColumnFactors<kCount> column_factors(int32_t first) const {
    ColumnFactors<kCount> factors;
    const int32_t col = first + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      factors.w_scale[i] = *reinterpret_cast<const float2*>(&w_scales[col + i * 8]);
      if constexpr (kBias) factors.bias[i] = *reinterpret_cast<const float2*>(&bias[col + i * 8]);
    }
    return factors;
  }

  // `first`: of the tile's columns in the slab.
  __device__ __forceinline__ void store(const typename Tile::Sums& sums, const TilePlace& place,
                                        int32_t first, uint32_t my_staging) const {
    if constexpr (size_of(kOut) == 2) {
      if (args.epilogue.bias == nullptr) {
        store_16bit<false>(sums, place, first, my_staging);
      } else {
        store_16bit<true>(sums, place, first, my_staging);
      }
    } else {
#pragma unroll
      for (int n8 = 0; n8 < kBlockN / 8; n8 += 2) {
        Tile::template store_groups_32bit<kOut>(sums, args.epilogue, n8,
                                                column_factors<2, true>(first + n8 * 8), place);
      }
    }
  }

  // A warp's 16 rows, 64 columns at a time.
  template <bool kBias>
  __device__ __forceinline__ void store_16bit(const typename Tile::Sums& sums,
                                              const TilePlace& place, int32_t first,
                                              uint32_t my_staging) const {
    const int lane = threadIdx.x % 32;
    const int row = lane / 8 % 2 * 8 + lane % 8;
    const int32_t warp_row = place.row_first + threadIdx.x / 32 % 4 * kWarpRows;
#pragma unroll
    for (int b = 0; b < kBlockN / Tile::kBoxCols; ++b) {
      const uint32_t to = my_staging + b % kStagedBoxes * kStagedBytes;
      // The copy engine has read what was staged here before.
      if (lane == 0) ptx::bulk_wait_group_read<kStagedBoxes - 1>();
      __syncwarp();
#pragma unroll
      for (int pair = 0; pair < Tile::kBoxCols / 16; ++pair) {
        const auto factors = column_factors<2, kBias>(first + b * Tile::kBoxCols + pair * 16);
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n8 = b * Tile::kBoxCols / 8 + pair * 2 + i / 2;
          const float2 y = Tile::template scaled_pair<2, kBias>(sums, n8, i / 2, i % 2, factors,
                                                                place.row_scale[i % 2]);
          words[i] = pack_16bit(kOut, y.x, y.y);
        }
        const int chunk = pair * 2 + lane / 16;
        ptx::stmatrix_x4(to + row * 128 + ((chunk ^ (row % 8)) * 16), words);
      }
      ptx::fence_proxy_async();
      __syncwarp();
      if (lane == 0) {
        const int32_t n = place.n_first + b * Tile::kBoxCols;
        if (n < args.n && warp_row < args.m) ptx::tma_store_2d(&args.out_map, to, n, warp_row);
        ptx::bulk_commit_group();
      }
    }
  }

  static __device__ __forceinline__ void run(const GemmArgs& args) {
    extern __shared__ __align__(1024) uint8_t storage[];
    if (threadIdx.x == 0 && ptx::shared_address(storage) % 1024 != 0) __trap();
    StationaryKernel kernel{args};
    kernel.cluster = ptx::cluster_blocks();
    kernel.rank = ptx::cluster_block_rank();
    const auto cluster_index = static_cast<int32_t>(blockIdx.x / kernel.cluster);
    const auto clusters = static_cast<int32_t>(gridDim.x / kernel.cluster);
    const int32_t slab_columns = args.n_tiles * kBlockN;
    kernel.n_first = (cluster_index % args.n_parts * static_cast<int32_t>(kernel.cluster) +
                      static_cast<int32_t>(kernel.rank)) *
                     slab_columns;
    kernel.n_tiles = min(args.n_tiles, max(0, (args.n - kernel.n_first + kBlockN - 1) / kBlockN));
    kernel.first_tile = cluster_index / args.n_parts;
    kernel.tile_step = clusters / args.n_parts;

    // What is swizzled comes first, at multiples of 1024.
    uint8_t* at = storage;
    const auto take = [&](uint32_t bytes) {
      uint8_t* const taken = at;
      at += bytes;
      return taken;
    };
    kernel.slab = ptx::shared_address(take(slab_columns * args.k_blocks * kBlockK));
    kernel.rows = take(args.stages * kernel.rows_bytes());
    kernel.staging = ptx::shared_address(take(8 * kStagedBoxes * kStagedBytes));
    kernel.w_scales = reinterpret_cast<float*>(take(slab_columns * 4));
    kernel.bias = reinterpret_cast<float*>(take(slab_columns * 4));
    kernel.scales = reinterpret_cast<float*>(take(args.stages * kBlockM * 4));
    auto* const head = reinterpret_cast<Head*>(at);
    kernel.slab_full = ptx::shared_address(head->slab);
    kernel.ring = {ptx::shared_address(head->rows.full), ptx::shared_address(head->rows.empty)};

    if (threadIdx.x == 0) {
      ptx::prefetch_tensormap(&args.w_map);
      if constexpr (!kQuantizes) ptx::prefetch_tensormap(&args.a_map);
      for (int s = 0; s < StationaryTile::kMaxRowBuffers; ++s) {
        // Who announces the bytes, and who writes.
        ptx::mbarrier_init(kernel.ring.full + s * 8, kQuantizes ? 1 + kWarpgroupThreads : 1);
        // The warps that multiply, of every block of the cluster.
        ptx::mbarrier_init(kernel.ring.empty + s * 8, 8 * kFreeing * kernel.cluster);
      }
      for (int b = 0; b < StationaryTile::kMaxSlabBoxes; ++b) {
        ptx::mbarrier_init(kernel.slab_full + b * 8, 1);
      }
      ptx::fence_mbarrier_init();
    }
    if (kernel.cluster > 1) {
      ptx::cluster_sync();
    } else {
      __syncthreads();
    }
    ptx::grid_dependency_wait();

    const int warpgroup = threadIdx.x / kWarpgroupThreads;
    if (warpgroup >= 2) {
      ptx::set_max_registers_dec<kProducerRegisters>();
      if (threadIdx.x == 2 * kWarpgroupThreads) kernel.load_slab();
      const int warp = threadIdx.x / 32 % 4;
      if constexpr (kSource == Source::kInt8) {
        if (threadIdx.x == 2 * kWarpgroupThreads) kernel.load_rows();
      }
      if constexpr (kSource == Source::kFloat16) {
        kernel.template quantize_all<__half>(warp);
      }
      if constexpr (kSource == Source::kBFloat16) {
        kernel.template quantize_all<__nv_bfloat16>(warp);
      }
    } else {
      ptx::set_max_registers_inc<kConsumerRegisters>();
      kernel.consume(warpgroup);
      // The block's shared memory must outlive its stores.
      if (threadIdx.x % 32 == 0) ptx::bulk_wait_group_read<0>();
    }
    // And what its neighbours send to it.
    __syncwarp();
    if (kernel.cluster > 1) ptx::cluster_sync();
  }
};

template <Source kSource, DType kOut>
__global__ void __launch_bounds__(StationaryTile::kThreads, 1)
    stationary_kernel(const __grid_constant__ GemmArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  StationaryKernel<kSource, kOut>::run(args);
#endif
}

}  // namespace int8_ops::cuda::sm90
