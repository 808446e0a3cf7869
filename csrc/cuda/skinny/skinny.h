// The matmul for few rows: int8_mm, int8_scaled_mm and int8_linear in one launch, for sm_80 and up.
#pragma once

#include "../../common/params.h"
#include "../heuristics/skinny_cost.h"

namespace int8_ops::cuda::skinny {

// Whether the path takes the problem: every row of w and of x or a starts 16-byte aligned, there
// are at most kMaxSkinnyRows of the latter, and some tile fits the device.
bool serves(const MatmulParams& p, const DeviceFacts& device);

SkinnyProblem problem_of(const MatmulParams& p);

// Launches a tile that fits. p.x: its rows are quantized on the way; else p.a and p.a_scale are
// read. Takes no workspace. Runs on the context's stream, on the current device.
void matmul(const MatmulParams& p, int32_t tile, const DeviceFacts& device);

}  // namespace int8_ops::cuda::skinny
