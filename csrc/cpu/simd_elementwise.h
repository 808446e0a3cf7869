// Quantize and dequantize, shared by the instruction sets: V is the vector-ops struct of one of
// them. See simd_matmul.h for the rules of such a header.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/numerics.h"
#include "kernels.h"
#include "simd_memory.h"

namespace int8_ops::cpu {
namespace {

// float32 bit patterns without the sign order like their values, Inf above every number and NaN
// above Inf. So an integer maximum of them finds amax and, in the same pass, NaN and Inf.
constexpr int32_t kInfBits = 0x7f800000;

template <typename V>
inline typename V::Int max_magnitude(typename V::Int so_far, typename V::Float x) {
  return V::max_int(so_far, V::magnitude_bits(x));
}

// amax's bits -> the scale: RN(amax / 127), 1 where that is zero or subnormal, NaN where the line
// holds a NaN or an Inf.
template <typename V>
inline typename V::Float scale_from_magnitude(typename V::Int bits) {
  const typename V::Float scale =
      V::div(V::bits_to_float(bits), V::broadcast(static_cast<float>(kQuantMax)));
  const typename V::Float usable =
      V::select_less(scale, V::broadcast(kMinNormalScale), V::broadcast(1.0F), scale);
  return V::nan_where_at_least(bits, kInfBits, usable);
}

// rint(RN(x / scale)), 0 where scale is NaN. |x| <= amax bounds it by 127: RN(amax / RN(amax /
// 127)) is at most 127 * (1 + 2^-22). With scale 1 for a vanishing line, x / scale rounds to 0 as
// it must.
template <typename V>
inline typename V::Int quantize_exact(typename V::Float x, typename V::Float scale) {
  return V::zero_where_nan(V::to_int(V::round(V::div(x, scale))), scale);
}

// Note [Quantize by reciprocal]
// r = RN(x * RN(1 / scale)) differs from x / scale by less than 2^-22.9 of it, RN(x / scale) by
// less than 2^-23.9; as |x / scale| < 128 the two are less than 2^-15 apart. So unless r lies that
// near to a half both round to the same integer; a vector with such a value (0.2 % of them) is
// divided. The bound used is 2^-14. scale is normal and at most 2^122, so its reciprocal is normal
// too, and a product below the normal range is far from a half.
template <typename V, DType kDType>
void quantize_row(const void* x, int64_t first, int64_t count, int8_t* q, float* scale_out) {
  typename V::Int bits = V::zero();
  int64_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) {
    bits = max_magnitude<V>(bits, load_floats<V, kDType>(x, first + i, V::kLanes));
  }
  if (i < count) bits = max_magnitude<V>(bits, load_floats<V, kDType>(x, first + i, count - i));
  const int32_t magnitude = V::horizontal_max(bits);
  const typename V::Float scale = scale_from_magnitude<V>(V::broadcast_int(magnitude));
  *scale_out = V::first_lane(scale);
  if (*scale_out != *scale_out) {
    std::memset(q + first, 0, count);
    return;
  }
  const typename V::Float inverse = V::div(V::broadcast(1.0F), scale);
  const typename V::Float near_half = V::broadcast(0.5F - 0x1p-14F);
  const auto quantize = [&](typename V::Float v) __attribute__((always_inline)) {
    const typename V::Float r = V::mul(v, inverse);
    const typename V::Float rounded = V::round(r);
    if (V::any_magnitude_above(V::sub(r, rounded), near_half)) [[unlikely]] {
      return V::to_int(V::round(V::div(v, scale)));
    }
    return V::to_int(rounded);
  };
  for (i = 0; i + V::kLanes <= count; i += V::kLanes) {
    V::store_int8(q + first + i, quantize(load_floats<V, kDType>(x, first + i, V::kLanes)));
  }
  if (i < count) {
    store_int8<V>(q + first + i, count - i,
                  quantize(load_floats<V, kDType>(x, first + i, count - i)));
  }
}

template <typename V>
void quantize_rows(const QuantizeParams& p, int64_t begin, int64_t end) {
  with_float_dtype(p.x_dtype, [&](auto dtype) {
    for (int64_t r = begin; r < end; ++r) {
      quantize_row<V, decltype(dtype)::value>(p.x, r * p.cols, p.cols, p.q, p.scale + r);
    }
  });
}

// Columns [begin, end), few enough that their scales stay in the L1 cache while the rows stream by.
// The scale array first holds the running magnitudes, then the scales.
template <typename V, DType kDType>
void quantize_strip(const QuantizeParams& p, int64_t begin, int64_t end) {
  const auto each_vector = [&](auto fn) __attribute__((always_inline)) {
    for (int64_t c = begin; c < end; c += V::kLanes) {
      fn(c, end - c < V::kLanes ? end - c : V::kLanes);
    }
  };
  std::memset(p.scale + begin, 0, (end - begin) * sizeof(float));
  for (int64_t r = 0; r < p.rows; ++r) {
    each_vector([&](int64_t c, int64_t count) __attribute__((always_inline)) {
      const auto so_far = V::float_bits(load_floats<V, DType::kFloat32>(p.scale, c, count));
      const auto x = load_floats<V, kDType>(p.x, r * p.cols + c, count);
      store_floats<V, DType::kFloat32>(p.scale, c, count,
                                       V::bits_to_float(max_magnitude<V>(so_far, x)));
    });
  }
  each_vector([&](int64_t c, int64_t count) __attribute__((always_inline)) {
    const auto bits = V::float_bits(load_floats<V, DType::kFloat32>(p.scale, c, count));
    store_floats<V, DType::kFloat32>(p.scale, c, count, scale_from_magnitude<V>(bits));
  });
  for (int64_t r = 0; r < p.rows; ++r) {
    each_vector([&](int64_t c, int64_t count) __attribute__((always_inline)) {
      const auto scale = load_floats<V, DType::kFloat32>(p.scale, c, count);
      const auto x = load_floats<V, kDType>(p.x, r * p.cols + c, count);
      store_int8<V>(p.q + r * p.cols + c, count, quantize_exact<V>(x, scale));
    });
  }
}

template <typename V>
void quantize_cols(const QuantizeParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kStripCols = 2048;
  with_float_dtype(p.x_dtype, [&](auto dtype) {
    for (int64_t c = begin; c < end; c += kStripCols) {
      quantize_strip<V, decltype(dtype)::value>(p, c, end - c < kStripCols ? end : c + kStripCols);
    }
  });
}

template <typename V>
void dequantize(const DequantizeParams& p, int64_t begin, int64_t end) {
  with_float_dtype(p.out_dtype, [&](auto dtype) {
    for (int64_t at = begin; at < end;) {
      const int64_t row = at / p.cols;
      const int64_t row_end = (row + 1) * p.cols < end ? (row + 1) * p.cols : end;
      typename V::Float scale = V::broadcast(p.scale_per_col ? 0.0F : p.scale[row]);
      while (at < row_end) {
        const int64_t count = row_end - at < V::kLanes ? row_end - at : V::kLanes;
        if (p.scale_per_col) {
          scale = load_floats<V, DType::kFloat32>(p.scale, at - row * p.cols, count);
        }
        store_floats<V, decltype(dtype)::value>(p.out, at, count,
                                                V::mul(load_int8<V>(p.q + at, count), scale));
        at += count;
      }
    }
  });
}

}  // namespace
}  // namespace int8_ops::cpu
