// What the files of instantiations/ instantiate of the streaming kernel.
#pragma once

#include "launchers.cuh"
#include "stream.cuh"

namespace int8_ops::cuda::sm90 {

template <int kTileIndex, Source kSource>
void launch_stream(const GemmArgs& args, const LaunchShape& shape, const ExecContext& ctx) {
  with_out_dtype<kSource>(args.epilogue.out_dtype, [&]<DType kOut>() {
    launch<stream_kernel<kTileIndex, kSource, kOut>>("sm90 streaming GEMM", shape, ctx, args);
  });
}

#define INT8_OPS_STREAM_TILE(i, source) \
  template void launch_stream<i, source>(const GemmArgs&, const LaunchShape&, const ExecContext&)

}  // namespace int8_ops::cuda::sm90
