// The matmul for few rows: int8_mm, int8_scaled_mm and int8_linear in one launch, for sm_80 and up.
#pragma once

#include "../../common/params.h"
#include "../heuristics/skinny_cost.h"

namespace int8_ops::cuda::skinny {

// Launches a tile that fits. p.x: its rows are quantized on the way; else p.a and p.a_scale are
// read. Takes no workspace. Runs on the context's stream, on the current device.
void matmul(const MatmulParams& p, int32_t tile, const DeviceFacts& device);

}  // namespace int8_ops::cuda::skinny
