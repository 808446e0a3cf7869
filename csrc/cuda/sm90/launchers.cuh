// One launcher a tile and a source of rows, each compiled in a file of instantiations/.
#pragma once

#include "../heuristics/sm90_tiles.h"
#include "../launch.cuh"
#include "gemm_args.cuh"

namespace int8_ops::cuda::sm90 {

using ResidentLauncher = void (*)(const GemmArgs&, uint32_t row_buffers, const LaunchShape&,
                                  const ExecContext&);
using StreamLauncher = void (*)(const GemmArgs&, const LaunchShape&, const ExecContext&);

template <int kTileIndex, Source kSource>
void launch_resident(const GemmArgs& args, uint32_t row_buffers, const LaunchShape& shape,
                     const ExecContext& ctx);
template <int kTileIndex, Source kSource>
void launch_stream(const GemmArgs& args, const LaunchShape& shape, const ExecContext& ctx);
using StationaryLauncher = void (*)(const GemmArgs&, LaunchShape, int32_t cluster_limit,
                                    const ExecContext&);
// The grid is as many clusters as run at once, at most `cluster_limit`.
template <int kKBlocks, Source kSource>
void launch_stationary(const GemmArgs& args, LaunchShape shape, int32_t cluster_limit,
                       const ExecContext& ctx);

// Calls visit.template operator()<out dtype>(). The output's dtype is part of a kernel's type: code
// for others between what runs would cost misses of the instruction cache.
template <Source kSource, typename Visitor>
void with_out_dtype(DType out, Visitor&& visit) {
  switch (out) {
    case DType::kInt32:
      if constexpr (kSource == Source::kInt8) {
        return visit.template operator()<DType::kInt32>();
      } else {
        throw std::logic_error("int8_ops: the sums of a quantized x are never asked for");
      }
    case DType::kFloat32:
      return visit.template operator()<DType::kFloat32>();
    case DType::kFloat16:
      return visit.template operator()<DType::kFloat16>();
    case DType::kBFloat16:
      return visit.template operator()<DType::kBFloat16>();
  }
}

}  // namespace int8_ops::cuda::sm90
