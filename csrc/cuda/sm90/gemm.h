// The Hopper GEMMs (wgmma, TMA), for sm_90a: bf16/fp16/fp32 or int8 rows times int8 [n, k]
// transposed. Which problems they take: serves_sm90() in heuristics/gemm_heuristics.h.
#pragma once

#include "../../common/params.h"
#include "../heuristics/gemm_heuristics.h"

namespace int8_ops::cuda::sm90 {

// Rows stay in shared memory; with p.x set they are quantized there. k at most 1024; the columns of
// a row tile are shared by `parts` clusters.
void resident(const MatmulParams& p, int32_t tile, int32_t parts, const DeviceFacts& device);

// Both operands stream; with p.x set it is quantized beside the products, into a workspace of so
// many bytes.
void stream(MatmulParams& p, int32_t tile, const DeviceFacts& device);
int64_t stream_workspace_bytes(const MatmulParams& p);

}  // namespace int8_ops::cuda::sm90
