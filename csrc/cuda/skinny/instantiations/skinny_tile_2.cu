#include "../skinny.cuh"

namespace int8_ops::cuda::skinny {
template void launch_tile<2>(const SkinnyArgs&, bool, DType, const LaunchShape&,
                             const ExecContext&);
}  // namespace int8_ops::cuda::skinny
