// The Hopper GEMMs (wgmma, TMA), for sm_90a: bf16/fp16/fp32 or int8 rows times int8 [n, k]
// transposed. Which problems they take: why_not_served() in heuristics/gemm_heuristics.h.
#pragma once

#include "../../common/params.h"
#include "../heuristics/gemm_heuristics.h"

namespace int8_ops::cuda::sm90 {

// Whether the driver runs the library's code of sm_90a on the current device: it may be told to
// compile the PTX of an older architecture instead, in which these kernels are empty.
bool has_code();

// Rows stay in shared memory; with p.x set they are quantized there. k at most 1024; the columns of
// a row tile are shared by `parts` blocks.
void resident(const MatmulParams& p, int32_t tile, int32_t parts, const DeviceFacts& device);

// Both operands stream; with p.x set it is quantized beside the products, into a workspace of so
// many bytes.
void stream(MatmulParams& p, int32_t tile, const DeviceFacts& device);
int64_t stream_workspace_bytes(const MatmulParams& p);

// w stays in registers, and rows pass by; with p.x set they are quantized on the way, some of them
// through a workspace of so many bytes. k at most StationaryTile::kMaxK.
void stationary(const MatmulParams& p, int32_t tile, const DeviceFacts& device);
int64_t stationary_workspace_bytes(const MatmulParams& p, int32_t tile, const DeviceFacts& device);

// Few rows and short K in one launch; with p.x set they are quantized on the way. Takes no
// workspace. k at most PanelTile::kMaxK.
void panel(const MatmulParams& p, int32_t tile);

}  // namespace int8_ops::cuda::sm90
