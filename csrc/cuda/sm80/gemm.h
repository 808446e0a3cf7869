// The mma.sync GEMM: int8 [m, k] times int8 [n, k] transposed, for sm_80 and up.
#pragma once

#include "../../common/params.h"
#include "../heuristics/gemm_heuristics.h"

namespace int8_ops::cuda::sm80 {

// Launches the planned tile, and the reduction when the plan splits K. p.workspace holds
// gemm_workspace_bytes(). Runs on the context's stream, on the current device.
void gemm(const MatmulParams& p, const GemmPlan& plan, int32_t sm_count);

}  // namespace int8_ops::cuda::sm80
