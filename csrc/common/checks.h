// What every device checks before a kernel sees a pointer: dtypes, shapes, devices. An error names
// the op, what was expected and what was got. One of the few headers that may include torch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "numerics.h"
#include "params.h"

namespace int8_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// STD_TORCH_CHECK puts a source path before the message; a user wants the message.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "int8_ops.";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

#define INT8_OPS_CHECK(cond, ...)    \
  do {                               \
    if (!(cond)) [[unlikely]] {      \
      ::int8_ops::fail(__VA_ARGS__); \
    }                                \
  } while (false)

inline std::string shape_string(const Tensor& t) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < t.dim(); ++i) out << (i != 0 ? ", " : "") << t.size(i);
  out << ']';
  return out.str();
}

inline const char* dtype_name(ScalarType type) { return torch::headeronly::toString(type); }

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType expected) {
  INT8_OPS_CHECK(t.scalar_type() == expected, op, ": expected ", name, " of dtype ",
                 dtype_name(expected), ", got ", dtype_name(t.scalar_type()));
}

inline void check_same_device(const char* op, const char* name, const Tensor& t,
                              const Tensor& first, const char* first_name) {
  INT8_OPS_CHECK(t.device() == first.device(), op, ": expected ", name, " on the device of ",
                 first_name, ", got two different devices");
}

// float32, float16 or bfloat16; anything else is refused by name.
inline DType float_dtype(const char* op, const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      fail(op, ": expected ", name, " of dtype Float, Half or BFloat16, got ", dtype_name(type));
  }
}

// The last dimension is a row; everything before it counts rows.
struct RowsCols {
  int64_t rows;
  int64_t cols;
};

inline RowsCols rows_cols(const char* op, const char* name, const Tensor& t) {
  INT8_OPS_CHECK(t.dim() >= 1, op, ": expected ", name, " of at least 1 dimension, got a scalar");
  RowsCols shape{1, t.size(t.dim() - 1)};
  for (int64_t i = 0; i + 1 < t.dim(); ++i) shape.rows *= t.size(i);
  INT8_OPS_CHECK(shape.cols > 0, op, ": expected ", name,
                 " with a last dimension of at least 1, got ", shape_string(t));
  return shape;
}

struct MatmulShape {
  int64_t m;
  int64_t n;
  int64_t k;
};

// a [..., K], w [N, K].
inline MatmulShape check_matmul_shape(const char* op, const char* a_name, const Tensor& a,
                                      const Tensor& w) {
  INT8_OPS_CHECK(w.dim() == 2, op, ": expected w of shape [N, K], got ", shape_string(w));
  const RowsCols shape = rows_cols(op, a_name, a);
  INT8_OPS_CHECK(shape.cols == w.size(1), op, ": expected ", a_name,
                 " and w with the same last dimension K, got ", a_name, " ", shape_string(a),
                 " and w ", shape_string(w));
  INT8_OPS_CHECK(shape.cols <= kMaxK, op, ": K = ", shape.cols, " is over the limit of ", kMaxK,
                 " at which an int32 sum of int8 products can overflow");
  check_dtype(op, "w", w, ScalarType::Char);
  check_same_device(op, "w", w, a, a_name);
  return {shape.rows, w.size(0), shape.cols};
}

inline void check_w_scale(const char* op, const Tensor& w_scale, const Tensor& w) {
  check_dtype(op, "w_scale", w_scale, ScalarType::Float);
  INT8_OPS_CHECK(w_scale.dim() == 2 && w_scale.size(0) == w.size(0) && w_scale.size(1) == 1, op,
                 ": expected w_scale of shape [", w.size(0), ", 1], got ", shape_string(w_scale));
  check_same_device(op, "w_scale", w_scale, w, "w");
}

inline void check_a_scale(const char* op, const Tensor& a_scale, const Tensor& a) {
  check_dtype(op, "a_scale", a_scale, ScalarType::Float);
  bool ok = a_scale.dim() == a.dim() && a_scale.size(a.dim() - 1) == 1;
  for (int64_t i = 0; ok && i + 1 < a.dim(); ++i) ok = a_scale.size(i) == a.size(i);
  INT8_OPS_CHECK(ok, op, ": expected a_scale of a's shape with a last dimension of 1, got a_scale ",
                 shape_string(a_scale), " for a ", shape_string(a));
  check_same_device(op, "a_scale", a_scale, a, "a");
}

inline void check_bias(const char* op, const std::optional<Tensor>& bias, const Tensor& w) {
  if (!bias.has_value()) return;
  float_dtype(op, "bias", bias->scalar_type());
  INT8_OPS_CHECK(bias->dim() == 1 && bias->size(0) == w.size(0), op, ": expected bias of shape [",
                 w.size(0), "], got ", shape_string(*bias));
  check_same_device(op, "bias", *bias, w, "w");
}

}  // namespace int8_ops
