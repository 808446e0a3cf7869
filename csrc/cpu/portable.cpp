// The portable kernels: plain C++, the slowest and the plainest statement of the numerics in C++.
#include <cmath>
#include <limits>

#include "../common/numerics.h"
#include "kernels.h"
#include "portable_floats.h"

namespace int8_ops::cpu {
namespace {

// Quantizes `count` values that stand `stride` apart; returns their scale.
float quantize_line(const QuantizeParams& p, int64_t first, int64_t count, int64_t stride) {
  float amax = 0.0F;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    const float x = load_as_float(p.x, p.x_dtype, first + i * stride);
    finite = finite && std::isfinite(x);
    amax = std::fmax(amax, std::fabs(x));
  }
  const float scale = amax / static_cast<float>(kQuantMax);
  const bool zero = !(scale >= kMinNormalScale);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = first + i * stride;
    p.q[at] = !finite || zero
                  ? int8_t{0}
                  : static_cast<int8_t>(std::nearbyint(load_as_float(p.x, p.x_dtype, at) / scale));
  }
  if (!finite) return std::numeric_limits<float>::quiet_NaN();
  return zero ? 1.0F : scale;
}

void quantize_rows(const QuantizeParams& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) p.scale[r] = quantize_line(p, r * p.cols, p.cols, 1);
}

void quantize_cols(const QuantizeParams& p, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) p.scale[c] = quantize_line(p, c, p.rows, p.cols);
}

void dequantize(const DequantizeParams& p, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; ++at) {
    const float scale = p.scale[p.scale_per_col ? at % p.cols : at / p.cols];
    store_from_float(p.out, p.out_dtype, at, static_cast<float>(p.q[at]) * scale);
  }
}

// A row of w at a time, so that it stays in the cache while the rows of a pass by.
void matmul_dot(const MatmulParams& p, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) {
    const float bias = p.bias != nullptr ? load_as_float(p.bias, p.bias_dtype, j) : 0.0F;
    for (int64_t i = 0; i < p.m; ++i) {
      const int32_t acc = dot(p.a + i * p.k, p.w + j * p.k, p.k);
      const int64_t at = i * p.n + j;
      if (p.out_dtype == DType::kInt32) {
        static_cast<int32_t*>(p.out)[at] = acc;
        continue;
      }
      float y = static_cast<float>(acc) * p.a_scale[i] * p.w_scale[j];
      if (p.bias != nullptr) y += bias;
      store_from_float(p.out, p.out_dtype, at, y);
    }
  }
}

constexpr TileShape kDotPathOnly = {};

}  // namespace

const KernelTable kPortableKernels = {"portable",
                                      quantize_rows,
                                      quantize_cols,
                                      dequantize,
                                      kDotPathOnly,
                                      matmul_dot,
                                      nullptr,
                                      nullptr,
                                      nullptr,
                                      attend_split_portable,
                                      combine_attention_portable};

}  // namespace int8_ops::cpu
