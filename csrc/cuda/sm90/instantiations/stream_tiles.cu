#include "../launchers.cuh"
#include "../stream.cuh"

namespace int8_ops::cuda::sm90 {

template <int kTileIndex>
void launch_stream(const GemmArgs& args, const LaunchShape& shape, const ExecContext& ctx) {
  launch<stream_kernel<kTileIndex>>("sm90 streaming GEMM", shape, ctx, args);
}

template void launch_stream<0>(const GemmArgs&, const LaunchShape&, const ExecContext&);
template void launch_stream<1>(const GemmArgs&, const LaunchShape&, const ExecContext&);
template void launch_stream<2>(const GemmArgs&, const LaunchShape&, const ExecContext&);

}  // namespace int8_ops::cuda::sm90
