// A warpgroup that multiplies: it takes stages from the ring, gives them back, and scales and
// stores one tile after the other.
//
// Note [Two sets of sums]
// Where registers allow it, a warpgroup starts the products of the next tile and only then scales
// and stores the sums of the last one: the tensor cores work while the epilogue runs.
#pragma once

#include "../ptx/cluster.cuh"
#include "gemm_args.cuh"
#include "ring.cuh"
#include "warpgroup_tile.cuh"

namespace int8_ops::cuda::sm90 {

// Operands says where a K-block lies: a(k_block, stage) and w(stage), as descriptors.
// kSets: one or two sets of sums. kAhead: K-blocks of a tile that may be started before the tile
// before it is stored, at least two; they hold that many stages.
template <typename Tile, DType kOut, int kCluster, int kSets, int kAhead, typename Operands>
struct Consumer {
  using Sums = typename Tile::Sums;
  static_assert(kSets == 1 || kSets == 2);
  static_assert(kAhead >= 2);

  Operands operands;
  const GemmArgs& args;
  const typename Tile::Factors* factors;  // [args.factor_slots]
  uint32_t staging;                       // of this warpgroup
  RingBarriers ring;
  RingBarriers slots;  // of the factors; empty alone
  RingPlace read;      // the next stage to multiply
  RingPlace freed;     // the next stage to give back
  RingPlace slot;      // of the factors of the next tile to store

  // Multiplies, scales and stores the tiles that next(place) names until it returns false.
  template <typename Next>
  __device__ __forceinline__ void run(Next&& next) {
    TilePlace place;
    if (!next(place)) return;
    if constexpr (kSets == 2) {
      TilePlace other;
      Sums even;
      Sums odd;
      step<true>(even, odd, place);
      while (true) {
        if (!next(other)) return finish(even, place);
        step<false>(odd, even, place);
        if (!next(place)) return finish(odd, other);
        step<false>(even, odd, other);
      }
    } else {
      Sums sums;
      do {
        multiply(sums, 0);
        multiply_rest(sums, [] {});
        finish(sums, place);
      } while (next(place));
    }
  }

 private:
  __device__ __forceinline__ void multiply(Sums& sums, int32_t k_block) {
    ring.wait_full(read);
    Tile::multiply(sums, operands.a(k_block, read.stage), operands.w(read.stage), k_block != 0);
    read.next(args.stages);
  }

  // In every block of the cluster: each of them loads a share of every stage.
  __device__ __forceinline__ void free_stage() {
    const uint32_t lane = threadIdx.x % 32;
    if constexpr (kCluster == 1) {
      if (lane == 0) ptx::mbarrier_arrive(ring.empty_at(freed));
    } else {
      if (lane < kCluster) ptx::mbarrier_arrive_cluster(ring.empty_at(freed), lane);
    }
    freed.next(args.stages);
  }

  // Starts a tile's products into `now`, and finishes the tile before, whose sums are in `before`.
  // One group of products is under way at the end.
  template <bool kFirst>
  __device__ __forceinline__ void step(Sums& now, Sums& before, const TilePlace& before_place) {
    multiply(now, 0);
    if constexpr (kFirst) {
      multiply_rest(now, [] {});
    } else {
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_touch(before);
      free_stage();
      multiply_rest(now, [&] { store(before, before_place); });
    }
  }

  // All K-blocks but the first; meanwhile() is called when kAhead of them are under way.
  template <typename Meanwhile>
  __device__ __forceinline__ void multiply_rest(Sums& sums, Meanwhile&& meanwhile) {
    const int32_t ahead = min(kAhead, args.k_blocks);
    int32_t b = 1;
    for (; b < ahead; ++b) multiply(sums, b);
    meanwhile();
    for (; b < args.k_blocks; ++b) {
      ptx::wgmma_wait_group<kAhead - 1>();
      free_stage();
      multiply(sums, b);
    }
    if (ahead == 1) return;
    ptx::wgmma_wait_group<1>();
    for (int32_t left = 1; left < ahead; ++left) free_stage();
  }

  __device__ __forceinline__ void finish(Sums& last, const TilePlace& place) {
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_touch(last);
    free_stage();
    store(last, place);
  }

  __device__ __forceinline__ void store(const Sums& sums, TilePlace place) {
    const typename Tile::Factors& tile_factors = factors[slot.stage];
    if constexpr (Operands::kRowFactors) {
      const int row = place.row_first % (2 * kWarpgroupM) + Tile::row_of_thread();
      place.row_scale[0] = tile_factors.row_scale[row];
      place.row_scale[1] = tile_factors.row_scale[row + 8];
    }
    if constexpr (size_of(kOut) == 2) {
      Tile::template store_16bit<kOut>(sums, args.epilogue, tile_factors, place, &args.out_map,
                                       staging);
    } else {
      Tile::template store_32bit<kOut>(sums, args.epilogue, tile_factors, place);
    }
    ptx::mbarrier_arrive(slots.empty_at(slot));
    slot.next(args.factor_slots);
  }
};

// The factors of a tile come with its last K-block, to the same barrier, which must expect bytes().
// Those of rows where kRows; m is a multiple of four then, or padded to one.
template <bool kRows, int kBlockN>
struct FactorLoader {
  const GemmArgs& args;
  int32_t n_first;
  int32_t row_first;
  uint32_t columns;
  uint32_t bias_size;
  uint32_t rows;

  __device__ __forceinline__ FactorLoader(const GemmArgs& args_in, int32_t n, int32_t row)
      : args(args_in), n_first(n), row_first(row) {
    const ScaleEpilogue& e = args.epilogue;
    const bool any = e.out_dtype != DType::kInt32 && n < e.n;
    columns = any ? static_cast<uint32_t>(min(kBlockN, e.n - n)) : 0;
    bias_size = e.bias == nullptr ? 0 : e.bias_dtype == DType::kFloat32 ? 4 : 2;
    rows = 0;
    if (kRows && row < args.m) {
      rows = static_cast<uint32_t>(min(2 * kWarpgroupM, (args.m - row + 3) / 4 * 4));
    }
  }
  __device__ __forceinline__ uint32_t bytes() const { return columns * (4 + bias_size) + rows * 4; }
  __device__ __forceinline__ void load(TileFactors<kBlockN>& to, uint32_t barrier) const {
    const ScaleEpilogue& e = args.epilogue;
    if (columns > 0) {
      ptx::bulk_load(ptx::shared_address(to.w_scale), e.w_scale + n_first, columns * 4, barrier);
      if (bias_size > 0) {
        ptx::bulk_load(ptx::shared_address(to.bias),
                       static_cast<const uint8_t*>(e.bias) + int64_t{n_first} * bias_size,
                       columns * bias_size, barrier);
      }
    }
    if (rows > 0) {
      ptx::bulk_load(ptx::shared_address(to.row_scale), args.row_scales + row_first, rows * 4,
                     barrier);
    }
  }
};

}  // namespace int8_ops::cuda::sm90
