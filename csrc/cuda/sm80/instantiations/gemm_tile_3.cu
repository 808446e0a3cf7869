#include "../gemm.cuh"

namespace int8_ops::cuda::sm80 {
template void launch_gemm<3>(const GemmArgs&, bool, int32_t, const ExecContext&);
}  // namespace int8_ops::cuda::sm80
