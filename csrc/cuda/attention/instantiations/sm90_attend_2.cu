#include "../sm90_launch.cuh"

namespace int8_ops::cuda::attention {

INT8_OPS_ATTEND(64, 2, 1);
INT8_OPS_ATTEND(64, 2, max_quads(64, 2));
INT8_OPS_ATTEND(128, 2, 1);
INT8_OPS_ATTEND(128, 2, max_quads(128, 2));

}  // namespace int8_ops::cuda::attention
