// The portable kernels: plain C++, the slowest and the plainest statement of the numerics in C++.
#include <cmath>
#include <cstring>
#include <limits>

#include "../common/numerics.h"
#include "kernels.h"

namespace int8_ops::cpu {
namespace {

float half_bits_to_float(uint16_t bits) {
  _Float16 h;
  std::memcpy(&h, &bits, sizeof h);
  return static_cast<float>(h);
}

float load_as_float(const void* base, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(base)[i];
  const uint16_t bits = static_cast<const uint16_t*>(base)[i];
  if (dtype == DType::kFloat16) return half_bits_to_float(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}

uint16_t float_to_bfloat16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;  // torch's quiet NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void store_from_float(void* base, DType dtype, int64_t i, float x) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(base)[i] = x;
  } else if (dtype == DType::kFloat16) {
    const _Float16 h = static_cast<_Float16>(x);
    std::memcpy(static_cast<uint16_t*>(base) + i, &h, sizeof h);
  } else {
    static_cast<uint16_t*>(base)[i] = float_to_bfloat16_bits(x);
  }
}

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

void dequantize_rows(const DequantizeParams& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t c = 0; c < p.cols; ++c) {
      const int64_t at = r * p.cols + c;
      const float scale = p.scale[p.scale_per_col ? c : r];
      store_from_float(p.out, p.out_dtype, at, static_cast<float>(p.q[at]) * scale);
    }
  }
}

void matmul_cols(const MatmulParams& p, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < p.m; ++i) {
    for (int64_t j = begin; j < end; ++j) {
      int32_t acc = 0;
      for (int64_t k = 0; k < p.k; ++k) {
        acc += static_cast<int32_t>(p.a[i * p.k + k]) * static_cast<int32_t>(p.w[j * p.k + k]);
      }
      const int64_t at = i * p.n + j;
      if (p.out_dtype == DType::kInt32) {
        static_cast<int32_t*>(p.out)[at] = acc;
        continue;
      }
      float y = static_cast<float>(acc) * p.a_scale[i] * p.w_scale[j];
      if (p.bias != nullptr) y += load_as_float(p.bias, p.bias_dtype, j);
      store_from_float(p.out, p.out_dtype, at, y);
    }
  }
}

}  // namespace

const KernelTable kPortableKernels = {"portable", quantize_rows, quantize_cols, dequantize_rows,
                                      matmul_cols};

}  // namespace int8_ops::cpu
