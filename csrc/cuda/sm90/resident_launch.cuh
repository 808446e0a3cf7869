// What the files of instantiations/ instantiate of the resident kernel.
#pragma once

#include "launchers.cuh"
#include "resident.cuh"

namespace int8_ops::cuda::sm90 {

template <int kTileIndex, Source kSource>
void launch_resident(const GemmArgs& args, uint32_t row_buffers, const LaunchShape& shape,
                     const ExecContext& ctx) {
  with_out_dtype<kSource>(args.epilogue.out_dtype, [&]<DType kOut>() {
    launch<resident_kernel<kTileIndex, kSource, kOut>>("sm90 resident GEMM", shape, ctx, args,
                                                       row_buffers);
  });
}

#define INT8_OPS_RESIDENT_TILE(i, source)                                                 \
  template void launch_resident<i, source>(const GemmArgs&, uint32_t, const LaunchShape&, \
                                           const ExecContext&)

}  // namespace int8_ops::cuda::sm90
