// One launcher an instantiation, each compiled in a file of instantiations/.
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
template <int kTileIndex>
void launch_stream(const GemmArgs& args, const LaunchShape& shape, const ExecContext& ctx);

}  // namespace int8_ops::cuda::sm90
