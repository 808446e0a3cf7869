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
template <typename Tile, int kCluster, bool kTwoSets, bool kRawSums, typename Operands>
struct Consumer {
  using Sums = typename Tile::Sums;

  Operands operands;
  const GemmArgs& args;
  const typename Tile::Factors* factors;  // [args.factor_slots]
  uint32_t staging;                       // of this warpgroup
  RingBarriers ring;
  RingPlace read;   // the next stage to multiply
  RingPlace freed;  // the next stage to give back
  int32_t slot;     // of the factors of the next tile to store

  // Multiplies, scales and stores the tiles that next(place) names until it returns false.
  template <typename Next>
  __device__ __forceinline__ void run(Next&& next) {
    TilePlace place;
    if (!next(place)) return;
    if constexpr (kTwoSets) {
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
        for (int32_t b = 1; b < args.k_blocks; ++b) {
          multiply(sums, b);
          ptx::wgmma_wait_group<1>();
          free_stage();
        }
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
    if constexpr (!kFirst) {
      ptx::wgmma_wait_group<1>();
      ptx::wgmma_touch(before);
      free_stage();
    }
    if (args.k_blocks > 1) multiply(now, 1);
    if constexpr (!kFirst) store(before, before_place);
    for (int32_t b = 2; b < args.k_blocks; ++b) {
      ptx::wgmma_wait_group<1>();
      free_stage();
      multiply(now, b);
    }
    if (args.k_blocks > 1) {
      ptx::wgmma_wait_group<1>();
      free_stage();
    }
  }

  __device__ __forceinline__ void finish(Sums& last, const TilePlace& place) {
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_touch(last);
    free_stage();
    store(last, place);
  }

  __device__ __forceinline__ void store(const Sums& sums, const TilePlace& place) {
    const typename Tile::Factors& columns = factors[slot];
    if (++slot == args.factor_slots) slot = 0;
    if (args.epilogue.bias != nullptr) {
      store_with<true>(sums, columns, place);
    } else {
      store_with<false>(sums, columns, place);
    }
  }

  template <bool kBias>
  __device__ __forceinline__ void store_with(const Sums& sums,
                                             const typename Tile::Factors& columns,
                                             const TilePlace& place) {
    const ScaleEpilogue& epilogue = args.epilogue;
    switch (epilogue.out_dtype) {
      case DType::kInt32:
        if constexpr (kRawSums && !kBias) {
          Tile::template store_32bit<DType::kInt32, false>(sums, epilogue, columns, place);
        }
        return;
      case DType::kFloat32:
        return Tile::template store_32bit<DType::kFloat32, kBias>(sums, epilogue, columns, place);
      case DType::kFloat16:
        return Tile::template store_16bit<DType::kFloat16, kBias>(sums, epilogue, columns, place,
                                                                  &args.out_map, staging);
      case DType::kBFloat16:
        return Tile::template store_16bit<DType::kBFloat16, kBias>(sums, epilogue, columns, place,
                                                                   &args.out_map, staging);
    }
  }
};

// The factors of a tile's columns come with its last K-block. Bytes that count_factor_bytes()
// announced, to the same barrier.
__device__ __forceinline__ uint32_t count_factor_bytes(const ScaleEpilogue& e, int32_t n_first,
                                                       int32_t block_n) {
  if (e.out_dtype == DType::kInt32 || n_first >= e.n) return 0;
  const auto columns = static_cast<uint32_t>(min(block_n, e.n - n_first));
  const uint32_t bias_size = e.bias_dtype == DType::kFloat32 ? 4 : 2;
  return columns * 4 + (e.bias != nullptr ? columns * bias_size : 0);
}

template <int kBlockN>
__device__ __forceinline__ void load_factors(const ScaleEpilogue& e, int32_t n_first,
                                             ColumnFactors<kBlockN>* to, uint32_t barrier) {
  if (e.out_dtype == DType::kInt32 || n_first >= e.n) return;
  const auto columns = static_cast<uint32_t>(min(kBlockN, e.n - n_first));
  ptx::bulk_load(ptx::shared_address(to->w_scale), e.w_scale + n_first, columns * 4, barrier);
  if (e.bias == nullptr) return;
  const uint32_t size = e.bias_dtype == DType::kFloat32 ? 4 : 2;
  ptx::bulk_load(ptx::shared_address(to->bias),
                 static_cast<const uint8_t*>(e.bias) + static_cast<int64_t>(n_first) * size,
                 columns * size, barrier);
}

}  // namespace int8_ops::cuda::sm90
