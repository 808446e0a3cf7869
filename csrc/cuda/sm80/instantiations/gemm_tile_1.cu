#include "../gemm.cuh"

namespace int8_ops::cuda::sm80 {
template void launch_gemm<1>(const GemmArgs&, bool, int32_t, const ExecContext&);
}  // namespace int8_ops::cuda::sm80
