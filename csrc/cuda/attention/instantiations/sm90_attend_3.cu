#include "../sm90_launch.cuh"

namespace int8_ops::cuda::attention {

INT8_OPS_ATTEND(64, 3, 1);
INT8_OPS_ATTEND(64, 3, max_quads(64, 3));
INT8_OPS_ATTEND(128, 3, 1);
INT8_OPS_ATTEND(128, 3, max_quads(128, 3));

}  // namespace int8_ops::cuda::attention
