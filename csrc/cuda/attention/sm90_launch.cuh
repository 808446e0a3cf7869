// What the files of instantiations/ instantiate of the Hopper path's first half.
#pragma once

#include "sm90_attend.cuh"

namespace int8_ops::cuda::attention {

template <int kSize, int kChunks, int kQuads>
void launch_attend(const AttendArgs& args, const LaunchShape& shape) {
  launch<attend_kernel<kSize, kChunks, kQuads>>("sm90 latent attention", shape, args.p.ctx, args);
}

#define INT8_OPS_ATTEND(size, chunks, quads) \
  template void launch_attend<size, chunks, quads>(const AttendArgs&, const LaunchShape&)

}  // namespace int8_ops::cuda::attention
