#include "../stationary_launch.cuh"

namespace int8_ops::cuda::sm90 {
INT8_OPS_STATIONARY(4, Source::kInt8);
INT8_OPS_STATIONARY(4, Source::kFloat16);
INT8_OPS_STATIONARY(4, Source::kBFloat16);
}  // namespace int8_ops::cuda::sm90
