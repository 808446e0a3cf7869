// Where a matmul that is given x, and not a, keeps the rows it quantizes: at the front of its
// workspace. For the paths that quantize in a pass of their own; see MatmulParams::x.
#pragma once

#include "params.h"

namespace int8_ops {

constexpr int64_t align_workspace(int64_t bytes) { return (bytes + 255) / 256 * 256; }

inline int64_t quantized_rows_bytes(const MatmulParams& p) {
  return align_workspace(p.m * p.k) + align_workspace(p.m * static_cast<int64_t>(sizeof(float)));
}

// Points a and a_scale into the workspace, moves the workspace past them, and returns the
// quantization that fills them.
inline QuantizeParams place_quantized_rows(MatmulParams& p) {
  auto* base = static_cast<char*>(p.workspace);
  QuantizeParams quantize;
  quantize.x = p.x;
  quantize.x_dtype = p.x_dtype;
  quantize.q = reinterpret_cast<int8_t*>(base);
  quantize.scale = reinterpret_cast<float*>(base + align_workspace(p.m * p.k));
  quantize.rows = p.m;
  quantize.cols = p.k;
  quantize.ctx = p.ctx;
  p.x = nullptr;
  p.a = quantize.q;
  p.a_scale = quantize.scale;
  p.workspace = base + quantized_rows_bytes(p);
  return quantize;
}

}  // namespace int8_ops
