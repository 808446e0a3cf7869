#include "../sm90_launch.cuh"

namespace int8_ops::cuda::attention {

INT8_OPS_ATTEND(64, 1, 1);
INT8_OPS_ATTEND(64, 1, max_quads(64, 1));
INT8_OPS_ATTEND(128, 1, 1);
INT8_OPS_ATTEND(128, 1, max_quads(128, 1));

}  // namespace int8_ops::cuda::attention
