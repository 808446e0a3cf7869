// The table of CPU kernels, one an instruction set. A kernel works on a range of an index space so
// that ops.cpp can hand ranges to torch's thread pool; nothing here includes torch.
//
// Assumed of the caller's floating-point state: round to nearest even, which is the default of
// every thread. Flushing of subnormals (torch.set_flush_denormal) acts here as it does in torch
// itself.
#pragma once

#include "../common/params.h"
#include "matmul_plan.h"

namespace int8_ops::cpu {

struct KernelTable {
  const char* isa;

  // Scales a row: rows [begin, end).
  void (*quantize_rows)(const QuantizeParams& p, int64_t begin, int64_t end);
  // Scales a column: columns [begin, end).
  void (*quantize_cols)(const QuantizeParams& p, int64_t begin, int64_t end);
  // Elements [begin, end) of the flattened matrix.
  void (*dequantize)(const DequantizeParams& p, int64_t begin, int64_t end);

  // The two ways through a matmul: see Note [Two matmul paths] in matmul_plan.h.
  TileShape tile;
  // Rows [begin, end) of w, that is columns of out, straight from a and w.
  void (*matmul_dot)(const MatmulParams& p, int64_t begin, int64_t end);
  // Row blocks [begin, end) of a into the workspace. Null, as the next, where tile.max_rows is 0.
  void (*pack_row_blocks)(const MatmulParams& p, const MatmulPlan& plan, int64_t begin,
                          int64_t end);
  // One task of the plan, after every row block has been packed.
  void (*matmul_task)(const MatmulParams& p, const MatmulPlan& plan, int64_t task);
};

extern const KernelTable kPortableKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512VnniKernels;
#endif

}  // namespace int8_ops::cpu
