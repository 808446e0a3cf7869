// The rows that pass by the weight-stationary kernel: buffers for tiles of 64, which a cluster
// fills together. Each block brings a share of every tile and copies it into the shared memory of
// all: x is read and quantized once a cluster, and int8 rows cross L2's port once.
#pragma once

#include "../heuristics/sm90_tiles.h"
#include "../ptx/cluster.cuh"
#include "../ptx/tma.cuh"
#include "gemm_args.cuh"
#include "ring.cuh"
#include "row_round.cuh"

namespace int8_ops::cuda::sm90 {

struct StationaryRows {
  static constexpr int kTileRows = StationaryTile::kBlockM;
  static constexpr int kRowBytes = StationaryTile::kBlockK;  // of a row in a K-block
  static constexpr int kBoxBytes = kTileRows * kRowBytes;
  static constexpr int kThreads = 128;           // of the warpgroup that fills the buffers
  static constexpr uint32_t kGatherBarrier = 4;  // and the next, one for every warps that send

  const GemmArgs& args;
  uint8_t* buffers;  // [stages][k_blocks][64][128]; quantized: [stages][8][k_blocks][8][128]
  // A set of 64 a buffer and parity of its use: those of one tile are read while the next ones that
  // the buffer holds are written.
  float* scales;  // [2][stages][64]
  RingBarriers ring;
  uint32_t room;  // a barrier: buffers from first_late on are free for the first time
  int32_t first_late;
  uint32_t cluster;
  uint32_t rank;       // of this block in its cluster
  int32_t first_tile;  // of rows
  int32_t tile_step;

  // Tiles of rows that this cluster multiplies.
  __device__ __forceinline__ int32_t tiles() const {
    return first_tile < args.m_tiles ? (args.m_tiles - first_tile + tile_step - 1) / tile_step : 0;
  }
  __device__ __forceinline__ uint32_t buffer_bytes() const {
    return static_cast<uint32_t>(args.k_blocks) * kBoxBytes;
  }
  // Eight rows of all K-blocks, which quantized rows go to other blocks in.
  __device__ __forceinline__ uint32_t group_bytes() const {
    return static_cast<uint32_t>(args.k_blocks) * 8 * kRowBytes;
  }
  __device__ __forceinline__ int32_t share_rows() const {
    return kTileRows / static_cast<int32_t>(cluster);
  }
  __device__ __forceinline__ float* scales_of(const RingPlace& at) const {
    return scales + (at.parity * args.stages + at.stage) * kTileRows;
  }
  // The cluster's blocks are done with what the buffer held; `index` counts tiles.
  __device__ __forceinline__ void wait_room(const RingPlace& at, int32_t index) const {
    if (index >= first_late && index < args.stages) ptx::mbarrier_wait_parity(room, 0);
    ring.wait_empty(at);
  }

  // ---- int8 rows: the copy engine brings them, a warp their scales
  // ---------------------------------------------------

  // By one thread: the tiles' boxes, of which every block brings as many.
  __device__ __forceinline__ void load() const {
    const int32_t pieces = StationaryTile::pieces(static_cast<int32_t>(cluster), args.k_blocks);
    const int32_t count = pieces * args.k_blocks / static_cast<int32_t>(cluster);
    const auto everyone = static_cast<uint16_t>((1U << cluster) - 1);
    RingPlace at;
    for (int32_t i = 0; i < tiles(); ++i) {
      const int32_t first_row = (first_tile + i * tile_step) * kTileRows;
      wait_room(at, i);
      const uint32_t full = ring.full_at(at);
      ptx::mbarrier_arrive_expect_tx(full, buffer_bytes());
      const uint32_t buffer = ptx::shared_address(buffers) + at.stage * buffer_bytes();
      for (int32_t box = 0; box < count; ++box) {
        const int32_t index = static_cast<int32_t>(rank) * count + box;
        const int32_t k_block = index / pieces;
        const int32_t local = index % pieces * (kTileRows / pieces);
        const uint32_t to = buffer + k_block * kBoxBytes + local * kRowBytes;
        if (cluster == 1) {
          ptx::tma_load_2d(to, &args.a_map, full, k_block * kRowBytes, first_row + local);
        } else {
          ptx::tma_load_2d_multicast(to, &args.a_map, full, everyone, k_block * kRowBytes,
                                     first_row + local);
        }
      }
      at.next(args.stages);
    }
  }

  // By a warp, for its own block; none are needed for bare sums.
  __device__ __forceinline__ void load_scales() const {
    const float* const from = args.epilogue.a_scale;
    RingPlace at;
    for (int32_t i = 0; i < tiles(); ++i) {
      const int32_t local = threadIdx.x % 32 * 2;
      const int32_t row = (first_tile + i * tile_step) * kTileRows + local;
      float2 two = {0.0F, 0.0F};
      if (from != nullptr) {
        if (row < args.m) two.x = from[row];
        if (row + 1 < args.m) two.y = from[row + 1];
      }
      ring.wait_empty(at);
      *reinterpret_cast<float2*>(&scales_of(at)[local]) = two;
      ptx::mbarrier_arrive(ring.full_at(at));
      at.next(args.stages);
    }
  }

  // ---- 16-bit rows: a warpgroup quantizes this block's share of every tile
  // ---------------------------------------------------

  // `groups` groups of eight rows from `first_row` on go from here to the other blocks, and their
  // scales: two copies a block, by a lane each.
  __device__ __forceinline__ void send(const RingPlace& at, int32_t first_row,
                                       uint32_t groups) const {
    const uint32_t lane = threadIdx.x % 32;
    if (lane >= 2 * (cluster - 1)) return;
    uint32_t peer = rank + 1 + lane / 2;
    if (peer >= cluster) peer -= cluster;
    const bool scale = lane % 2 != 0;
    const uint32_t from = scale ? ptx::shared_address(scales_of(at) + first_row)
                                : ptx::shared_address(buffers) + at.stage * buffer_bytes() +
                                      static_cast<uint32_t>(first_row) / 8 * group_bytes();
    ptx::bulk_copy_to_block(ptx::shared_of_block(from, peer), from,
                            groups * (scale ? 32 : group_bytes()),
                            ptx::shared_of_block(ring.full_at(at), peer));
  }

  // What the other blocks send of a tile.
  __device__ __forceinline__ uint32_t received_bytes() const {
    return static_cast<uint32_t>(kTileRows - share_rows()) *
           (static_cast<uint32_t>(args.k_blocks) * kRowBytes + 4);
  }

  // Where a block puts its share of a tile.
  struct Share {
    uint8_t* q;  // [share_rows / 8][k_blocks][8][128]
    float* scales;
  };

  __device__ __forceinline__ Share share_in_buffer(const RingPlace& at) const {
    const int32_t first = static_cast<int32_t>(rank) * share_rows();
    return {buffers + at.stage * buffer_bytes() + first / 8 * group_bytes(), scales_of(at) + first};
  }

  // Of a row of the share. Sixteen chunks a K-block; two make sixteen bytes, whose place is
  // swizzled.
  __device__ __forceinline__ uint2* place_of(const Share& share, int32_t row, int32_t chunk) const {
    const int32_t sixteen = (chunk % 16 / 2) ^ (row % 8);
    return reinterpret_cast<uint2*>(share.q + row / 8 * group_bytes() +
                                    chunk / 16 * (8 * kRowBytes) + row % 8 * kRowBytes +
                                    sixteen * 16 + chunk % 2 * 8);
  }

  // Rare rows, read again: little code, and no registers.
  template <typename Round, typename T>
  __device__ __forceinline__ void divide_rows(const Share& share, const T* x, int32_t first_row,
                                              int32_t warp_row, uint32_t to_divide) const {
    __syncwarp();  // the scales are written
#pragma unroll 1
    for (; to_divide != 0; to_divide &= to_divide - 1) {
      const int32_t row = warp_row + Round::row_in_round(__ffs(static_cast<int>(to_divide)) - 1);
      const float divisor = share.scales[row];
#pragma unroll 1
      for (int32_t chunk = Round::lane(); chunk * kChunk < args.k; chunk += Round::kRowLanes) {
        Chunk<T> values;
        values.load(x + int64_t{first_row + row} * args.k + chunk * kChunk);
        *place_of(share, row, chunk) =
            quantize_chunk_by_division(values, {divisor, divisor, -1.0F});
      }
    }
  }

  // Quantizes a warp's rows and writes them from row `warp_row` of the share on; `first_row`: of x,
  // the share's first.
  template <typename Round, typename T>
  __device__ __forceinline__ void store_round(const Round& round,
                                              const typename Round::Factors& factors, float scale,
                                              const Share& share, const T* x, int32_t first_row,
                                              int32_t warp_row) const {
    constexpr int kKBlockStep = Round::kRowLanes / 16;  // from chunk to chunk of a lane
    uint2 q[Round::kPassCount][Round::kChunkCount];
    const uint32_t to_divide = round.quantize(factors, q);
#pragma unroll
    for (int p = 0; p < Round::kPassCount; ++p) {
      uint2* const to = place_of(share, warp_row + Round::row_in_round(p), Round::lane());
#pragma unroll
      for (int i = 0; i < Round::kChunkCount; ++i) {
        if (Round::lane() / 16 + i * kKBlockStep < args.k_blocks) {
          to[i * kKBlockStep * kRowBytes] = q[p][i];  // a K-block of eight rows, eight bytes each
        }
      }
    }
    if (Round::lane() < Round::kPassCount) {
      share.scales[warp_row + Round::row_in_round(Round::lane())] = scale;
    }
    if (__any_sync(0xffffffffu, to_divide != 0)) {
      divide_rows<Round>(share, x, first_row, warp_row, to_divide);
    }
  }

  // A warp's rows of a tile lie in its registers; the next tile's are loaded meanwhile.
  template <typename T, int kLanes, int kChunks, int kPasses>
  __device__ __forceinline__ void quantize_rows(int warp) const {
    using Round = RowRound<T, kLanes, kChunks, kPasses>;
    // A group of eight rows is made by so many warps.
    constexpr int kGathered = Round::kRows < 8 ? 8 / Round::kRows : 1;
    const auto* const x = static_cast<const T*>(args.x);
    const int32_t share_first = static_cast<int32_t>(rank) * share_rows();
    const int32_t warp_row = warp * Round::kRows;
    const auto load = [&](Round& round, int32_t tile) {
      round.template load<false>(x, min(tile, args.m_tiles) * kTileRows + share_first + warp_row,
                                 args.m, args.k, args.k);
    };
    RingPlace at;
    Round now;
    load(now, first_tile);
    int32_t index = 0;
#pragma unroll 1
    for (int32_t tile = first_tile; tile < args.m_tiles; tile += tile_step, ++index) {
      Round next;
      load(next, tile + tile_step);
      prefetch(tile + 2 * tile_step, share_first + warp_row, Round::kRows, sizeof(T));
      float scale = 0.0F;
      const auto factors = now.find_factors([&](int32_t, float value) { scale = value; });
      wait_room(at, index);
      const Share share = share_in_buffer(at);
      store_round(now, factors, scale, share, x, tile * kTileRows + share_first, warp_row);
      ptx::fence_proxy_async();
      if (threadIdx.x % kThreads == 0) {
        ptx::mbarrier_arrive_expect_tx(ring.full_at(at), received_bytes());
      }
      ptx::mbarrier_arrive(ring.full_at(at));
      if constexpr (kGathered == 1) {
        __syncwarp();
        send(at, share_first + warp_row, Round::kRows / 8);
      } else {
        ptx::named_barrier_sync(kGatherBarrier + warp / kGathered, 32 * kGathered);
        if (warp % kGathered == 0) send(at, share_first + warp_row, 1);
      }
      at.next(args.stages);
      now = next;
    }
  }

  // ---- the same for K above 512, in clusters of eight: the shares go through L2
  // ---------------------------------------------------
  //
  // Note [How a share reaches eight blocks]
  // From shared memory to shared memory a copy goes to one block. Between eight blocks that takes
  // longer than the products: each receives seven eighths of every tile, at 18 bytes a nanosecond
  // (measured). One copy out of L2 reaches all eight. It has to wait until what the threads wrote
  // is in L2, which is most of what a tile takes then, but shorter.

  // In global memory, in effect in L2: a place a block and stage, of one group of rows.
  __device__ __forceinline__ Share share_in_l2(const RingPlace& at) const {
    auto* const base = reinterpret_cast<uint8_t*>(args.q) +
                       (blockIdx.x * args.stages + at.stage) *
                           static_cast<int64_t>(StationaryTile::share_bytes(args.k_blocks));
    return {base, reinterpret_cast<float*>(base + group_bytes())};
  }

  // From there to all blocks, this one among them.
  __device__ __forceinline__ void send_from_l2(const RingPlace& at) const {
    const auto everyone = static_cast<uint16_t>((1U << cluster) - 1);
    const uint32_t full = ring.full_at(at);
    const Share from = share_in_l2(at);
    const Share to = share_in_buffer(at);
    ptx::mbarrier_arrive_expect_tx(full, buffer_bytes() + kTileRows * 4);
    ptx::bulk_load_multicast(ptx::shared_address(to.q), from.q, group_bytes(), full, everyone);
    ptx::bulk_load_multicast(ptx::shared_address(to.scales), from.scales, 8 * 4, full, everyone);
  }

  // A warp has two rows of the block's eight.
  template <typename T>
  __device__ __forceinline__ void quantize_rows_through_l2(int warp) const {
    using Round = RowRound<T, 32, StationaryTile::kMaxKBlocks / 2, 2>;
    const auto* const x = static_cast<const T*>(args.x);
    const int32_t share_first = static_cast<int32_t>(rank) * share_rows();
    const int32_t warp_row = warp * Round::kRows;
    const auto load = [&](Round& round, int32_t tile) {
      round.template load<false>(x, min(tile, args.m_tiles) * kTileRows + share_first + warp_row,
                                 args.m, args.k, args.k);
    };
    RingPlace at;
    Round round;
    load(round, first_tile);
    int32_t index = 0;
#pragma unroll 1
    for (int32_t tile = first_tile; tile < args.m_tiles; tile += tile_step, ++index) {
      prefetch(tile + 2 * tile_step, share_first + warp_row, Round::kRows, sizeof(T));
      float scale = 0.0F;
      const auto factors = round.find_factors([&](int32_t, float value) { scale = value; });
      // What was there has reached every block: this one's part of it came last of all.
      if (index >= args.stages) ptx::mbarrier_wait_parity(ring.full_at(at), at.parity ^ 1);
      const Share share = share_in_l2(at);
      store_round(round, factors, scale, share, x, tile * kTileRows + share_first, warp_row);
      // Now, since the fence waits for loads too.
      load(round, tile + tile_step);
      ptx::fence_proxy_async_all();
      ptx::named_barrier_sync(kGatherBarrier, kThreads);
      if (threadIdx.x % kThreads == 0) {
        wait_room(at, index);
        send_from_l2(at);
      }
      __syncwarp();
      at.next(args.stages);
    }
  }

  // These rows of a tile come to L2.
  __device__ __forceinline__ void prefetch(int32_t tile, int32_t share, int32_t count,
                                           int32_t size) const {
    if (threadIdx.x % 32 != 0 || tile >= args.m_tiles) return;
    const int32_t row = tile * kTileRows + share;
    if (row >= args.m) return;
    const auto* const from = static_cast<const uint8_t*>(args.x) + int64_t{row} * args.k * size;
    ptx::prefetch_l2_bulk(from, static_cast<uint32_t>(min(count, args.m - row) * args.k * size));
  }

  // A warp takes 16 / cluster rows of a tile, of up to kKBlocks K-blocks.
  template <typename T, int kKBlocks>
  __device__ __forceinline__ void quantize(int warp) const {
    if constexpr (StationaryTile::through_l2(kKBlocks)) {
      quantize_rows_through_l2<T>(warp);
    } else {
      constexpr int kLanes = kKBlocks == 1 ? 16 : 32;
      constexpr int kChunks = kKBlocks * 16 / kLanes;
      constexpr int kRowsAtOnce = 32 / kLanes;
      if constexpr (kKBlocks <= 1) {
        if (cluster == 1) return quantize_rows<T, kLanes, kChunks, 16 / kRowsAtOnce>(warp);
      }
      if constexpr (kKBlocks <= 2) {
        if (cluster == 2) return quantize_rows<T, kLanes, kChunks, 8 / kRowsAtOnce>(warp);
      }
      if (cluster == 4) return quantize_rows<T, kLanes, kChunks, 4 / kRowsAtOnce>(warp);
      quantize_rows<T, kLanes, kChunks, 2 / kRowsAtOnce>(warp);
    }
  }
};

}  // namespace int8_ops::cuda::sm90
