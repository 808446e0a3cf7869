// From a problem to an architecture's kernel: reads the device's facts once, picks path and plan.
#pragma once

#include "../common/params.h"
#include "heuristics/gemm_heuristics.h"

namespace int8_ops::cuda {

// Chooses p's plan and returns the bytes of device memory that matmul() then wants in p.workspace.
int64_t matmul_workspace_bytes(MatmulParams& p);

// Runs p's plan: int8 matmul with the epilogue that p asks for, on the context's device and stream;
// with x set, its quantization first or inside.
void matmul(MatmulParams& p);

// What is known of the context's device; read once.
const DeviceFacts& device_facts(const ExecContext& ctx);

// Throws unless the context's device can run what was compiled.
void require_supported_device(const ExecContext& ctx);

}  // namespace int8_ops::cuda
