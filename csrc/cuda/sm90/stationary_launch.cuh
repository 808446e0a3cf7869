// What the files of instantiations/ instantiate of the weight-stationary kernel.
#pragma once

#include "launchers.cuh"
#include "stationary.cuh"

namespace int8_ops::cuda::sm90 {

template <int kKBlocks, Source kSource>
void launch_stationary(const GemmArgs& args, LaunchShape shape, int32_t cluster_limit,
                       const ExecContext& ctx) {
  with_out_dtype<kSource>(args.epilogue.out_dtype, [&]<DType kOut>() {
    constexpr auto kKernel = stationary_kernel<kSource, kOut, kKBlocks>;
    const int32_t resident = max_active_clusters<kKernel>("sm90 stationary GEMM", shape, ctx);
    const int32_t clusters = std::min(resident, cluster_limit) / args.n_parts * args.n_parts;
    shape.grid = dim3(static_cast<unsigned>(std::max(clusters, args.n_parts)) * shape.cluster);
    launch<kKernel>("sm90 stationary GEMM", shape, ctx, args);
  });
}

#define INT8_OPS_STATIONARY(k_blocks, source)                                     \
  template void launch_stationary<k_blocks, source>(const GemmArgs&, LaunchShape, \
                                                    int32_t cluster_limit, const ExecContext&)

}  // namespace int8_ops::cuda::sm90
