// The portable kernels: plain C++, the slowest and the plainest statement of the numerics in C++.
#include <cmath>
#include <cstring>
#include <limits>

#include "../common/numerics.h"
#include "kernels.h"

namespace int8_ops::cpu {
namespace {

float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// In integers and float32, because not every compiler that can build this has a 16-bit float type.
float half_bits_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude < 0x0400) {  // zero and subnormals: integer multiples of 2^-24
    const float x = static_cast<float>(magnitude) * 0x1p-24F;
    return sign != 0 ? -x : x;
  }
  return bits_to_float(sign | ((magnitude << 13) + ((127U - 15U) << 23)));
}

uint16_t float_to_half_bits(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  // From 65520 on, halfway between the largest half and 2^16, all rounds to infinity.
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) {
    // Below 2^-14 a half has steps of 2^-24, which are float32's own steps in [0.5, 1): the
    // addition rounds to them, and the step count is left in the low bits.
    return static_cast<uint16_t>(
        sign | (float_to_bits(bits_to_float(magnitude) + 0.5F) - float_to_bits(0.5F)));
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return static_cast<uint16_t>(sign | ((magnitude - ((127U - 15U) << 23) + 0xfff + odd) >> 13));
}

float load_as_float(const void* base, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(base)[i];
  const uint16_t bits = static_cast<const uint16_t*>(base)[i];
  if (dtype == DType::kFloat16) return half_bits_to_float(bits);
  return bits_to_float(static_cast<uint32_t>(bits) << 16);
}

uint16_t float_to_bfloat16_bits(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return 0x7fc0;  // torch's quiet NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void store_from_float(void* base, DType dtype, int64_t i, float x) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(base)[i] = x;
  } else if (dtype == DType::kFloat16) {
    static_cast<uint16_t*>(base)[i] = float_to_half_bits(x);
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

void dequantize(const DequantizeParams& p, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; ++at) {
    const float scale = p.scale[p.scale_per_col ? at % p.cols : at / p.cols];
    store_from_float(p.out, p.out_dtype, at, static_cast<float>(p.q[at]) * scale);
  }
}

int32_t dot(const int8_t* a, const int8_t* w, int64_t k) {
  int32_t acc = 0;
  for (int64_t i = 0; i < k; ++i) acc += static_cast<int32_t>(a[i]) * static_cast<int32_t>(w[i]);
  return acc;
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

const KernelTable kPortableKernels = {"portable",   quantize_rows, quantize_cols, dequantize,
                                      kDotPathOnly, matmul_dot,    nullptr,       nullptr};

}  // namespace int8_ops::cpu
