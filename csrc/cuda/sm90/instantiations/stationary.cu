#include "../stationary_launch.cuh"

namespace int8_ops::cuda::sm90 {
INT8_OPS_STATIONARY(Source::kInt8);
INT8_OPS_STATIONARY(Source::kFloat16);
INT8_OPS_STATIONARY(Source::kBFloat16);
}  // namespace int8_ops::cuda::sm90
