// The table of CPU kernels, one an instruction set. A kernel works on a range of an index space so
// that ops.cpp can hand ranges to torch's thread pool; nothing here includes torch.
#pragma once

#include "../common/params.h"

namespace int8_ops::cpu {

struct KernelTable {
  const char* isa;

  // Scales a row: rows [begin, end).
  void (*quantize_rows)(const QuantizeParams& p, int64_t begin, int64_t end);
  // Scales a column: columns [begin, end).
  void (*quantize_cols)(const QuantizeParams& p, int64_t begin, int64_t end);
  // Rows [begin, end).
  void (*dequantize_rows)(const DequantizeParams& p, int64_t begin, int64_t end);
  // Rows [begin, end) of w, that is columns of out.
  void (*matmul_cols)(const MatmulParams& p, int64_t begin, int64_t end);
};

extern const KernelTable kPortableKernels;

}  // namespace int8_ops::cpu
