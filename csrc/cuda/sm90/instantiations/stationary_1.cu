#include "../stationary_launch.cuh"

namespace int8_ops::cuda::sm90 {
INT8_OPS_STATIONARY(1, Source::kInt8);
INT8_OPS_STATIONARY(1, Source::kFloat16);
INT8_OPS_STATIONARY(1, Source::kBFloat16);
}  // namespace int8_ops::cuda::sm90
