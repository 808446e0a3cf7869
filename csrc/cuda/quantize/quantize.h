// Launchers of the quantize and dequantize kernels, sm_80 and up.
#pragma once

#include "../../common/params.h"

namespace int8_ops::cuda {

// A scale a row: x is read once where a row fits a block's registers (16,384 columns) and
// starts 16-byte aligned, twice elsewhere.
void quantize_rows(const QuantizeParams& p);

// A scale a column, without a transposed copy.
void quantize_cols(const QuantizeParams& p);

// Either kind of scale.
void dequantize(const DequantizeParams& p);

}  // namespace int8_ops::cuda
