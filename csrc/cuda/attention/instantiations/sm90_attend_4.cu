#include "../sm90_launch.cuh"

namespace int8_ops::cuda::attention {

INT8_OPS_ATTEND(64, 4, 1);
INT8_OPS_ATTEND(64, 4, max_quads(64, 4));
INT8_OPS_ATTEND(128, 4, 1);

}  // namespace int8_ops::cuda::attention
