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
#include <vector>

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

// int32 [batch], beside q.
inline void check_row_numbers(const char* op, const char* name, const Tensor& t, const Tensor& q) {
  check_dtype(op, name, t, ScalarType::Int);
  INT8_OPS_CHECK(t.dim() == 1 && t.size(0) == q.size(0), op, ": expected ", name, " of shape [",
                 q.size(0), "], got ", shape_string(t));
  check_same_device(op, name, t, q, "q");
}

// What latent_attention_decode is given of one stream, a list entry a slice.
struct StreamTensors {
  const char* name;  // "k" or "v"
  const std::vector<Tensor>& q;
  const std::vector<Tensor>& scale;
  const std::vector<Tensor>& a;
  const std::vector<Tensor>& a_scale;
  const std::optional<Tensor>& bias;
};

// Latents [B, G, S, r] or [B, G, S, r / 2], scales [B, G, S], A [G, out, r], its scales [G, out,
// 1], bias [G * out]; B and d are q's, and out a multiple of d.
inline void check_latent_stream(const char* op, const StreamTensors& s, const Tensor& q) {
  const auto count = static_cast<int64_t>(s.q.size());
  INT8_OPS_CHECK(count >= 1 && count <= kMaxSlices && s.scale.size() == s.q.size() &&
                     s.a.size() == s.q.size() && s.a_scale.size() == s.q.size(),
                 op, ": expected 1 to ", kMaxSlices, " slices of ", s.name,
                 ", each with a scale, an A and the scale of that, got ", count, " latents, ",
                 s.scale.size(), " scales, ", s.a.size(), " A and ", s.a_scale.size(),
                 " scales of A");
  const Tensor& first = s.q[0];
  INT8_OPS_CHECK(first.dim() == 4 && first.size(0) == q.size(0) && first.size(1) > 0, op,
                 ": expected ", s.name,
                 " latents of shape [B, G, S, width] with q's B = ", q.size(0), ", got ",
                 shape_string(first));
  INT8_OPS_CHECK(s.a[0].dim() == 3 && s.a[0].size(0) == first.size(1) && s.a[0].size(1) > 0 &&
                     s.a[0].size(1) % q.size(3) == 0,
                 op, ": expected A of ", s.name,
                 " of shape [G, out, rank] with the latents' G = ", first.size(1),
                 " and out a multiple of d = ", q.size(3), ", got ", shape_string(s.a[0]));
  for (int64_t i = 0; i < count; ++i) {
    const Tensor& latent = s.q[i];
    const Tensor& scale = s.scale[i];
    const Tensor& a = s.a[i];
    const Tensor& a_scale = s.a_scale[i];
    check_dtype(op, s.name, latent, ScalarType::Char);
    check_dtype(op, "the scale of a latent", scale, ScalarType::Float);
    check_dtype(op, "A", a, ScalarType::Char);
    check_dtype(op, "the scale of A", a_scale, ScalarType::Float);
    for (const Tensor* t : {&latent, &scale, &a, &a_scale}) {
      check_same_device(op, s.name, *t, q, "q");
    }
    bool same = latent.dim() == 4 && a.dim() == 3 && scale.dim() == 3 && a_scale.dim() == 3;
    for (int64_t j = 0; same && j < 3; ++j) {
      same = latent.size(j) == first.size(j) && scale.size(j) == first.size(j);
    }
    same = same && a.size(0) == s.a[0].size(0) && a.size(1) == s.a[0].size(1) &&
           a_scale.size(0) == a.size(0) && a_scale.size(1) == a.size(1) && a_scale.size(2) == 1;
    INT8_OPS_CHECK(same, op, ": expected slices of ", s.name,
                   " that agree: latents [B, G, S, width], scales [B, G, S], A [G, out, rank], "
                   "its scales [G, out, 1], got ",
                   shape_string(latent), ", ", shape_string(scale), ", ", shape_string(a), " and ",
                   shape_string(a_scale), " after latents ", shape_string(first));
    const int64_t rank = a.size(2);
    INT8_OPS_CHECK(
        rank >= 1 && rank <= kMaxK && (latent.size(3) == rank || 2 * latent.size(3) == rank), op,
        ": expected latents of ", s.name,
        " as wide as A's rank (int8), or half as wide (int4, two a byte), got width ",
        latent.size(3), " and rank ", rank);
  }
  if (!s.bias.has_value()) return;
  float_dtype(op, "bias", s.bias->scalar_type());
  INT8_OPS_CHECK(s.bias->dim() == 1 && s.bias->size(0) == s.a[0].size(0) * s.a[0].size(1), op,
                 ": expected bias of ", s.name, " of shape [", s.a[0].size(0) * s.a[0].size(1),
                 "], got ", shape_string(*s.bias));
  check_same_device(op, "bias", *s.bias, q, "q");
}

// New latents [B, G, n, rank], and a stream's buffers [B, G, S, width] with scales [B, G, S], a
// list entry a slice: int8 as wide as a slice's rank, int4 half as wide. They are written, so they
// are never copied: a token's values, and scales, must be neighbours.
inline void check_append_stream(const char* op, const char* name, const Tensor& x,
                                const Tensor& like, const std::vector<int64_t>& bits,
                                const std::vector<Tensor>& q, const std::vector<Tensor>& scale) {
  float_dtype(op, name, x.scalar_type());
  INT8_OPS_CHECK(x.dim() == 4, op, ": expected ", name, " of shape [B, G, n, rank], got ",
                 shape_string(x));
  INT8_OPS_CHECK(!bits.empty() && bits.size() <= static_cast<size_t>(kMaxSlices) &&
                     q.size() == bits.size() && scale.size() == bits.size(),
                 op, ": expected 1 to ", kMaxSlices, " slices of ", name,
                 ", each with bits, a buffer and scales, got ", bits.size(), ", ", q.size(),
                 " and ", scale.size());
  int64_t rank = 0;
  for (size_t i = 0; i < bits.size(); ++i) {
    INT8_OPS_CHECK(bits[i] == 8 || bits[i] == 4, op, ": expected bits of ", name,
                   " of 8 or 4, got ", bits[i]);
    check_dtype(op, "a buffer", q[i], ScalarType::Char);
    check_dtype(op, "a buffer's scale", scale[i], ScalarType::Float);
    check_same_device(op, "a buffer", q[i], like, "k");
    check_same_device(op, "a buffer's scale", scale[i], like, "k");
    bool same = q[i].dim() == 4 && scale[i].dim() == 3 && q[i].size(0) == x.size(0) &&
                q[i].size(1) == x.size(1) && q[i].size(2) == q[0].size(2);
    for (int64_t j = 0; same && j < 3; ++j) same = scale[i].size(j) == q[i].size(j);
    INT8_OPS_CHECK(same, op, ": expected buffers [B, G, S, width] and scales [B, G, S] for ", name,
                   " ", shape_string(x), ", got ", shape_string(q[i]), " and ",
                   shape_string(scale[i]));
    INT8_OPS_CHECK(q[i].stride(3) == 1 && scale[i].stride(2) == 1, op, ": expected buffers of ",
                   name, " whose last dimension is contiguous");
    rank += q[i].size(3) * (8 / bits[i]);
  }
  INT8_OPS_CHECK(rank == x.size(3), op, ": expected buffers for the ", x.size(3), " numbers of ",
                 name, ", got some for ", rank);
}

inline void check_latent_attention(const char* op, const Tensor& q, const StreamTensors& k,
                                   const StreamTensors& v, const Tensor& inv_freq,
                                   const Tensor& start, const Tensor& length,
                                   const std::optional<Tensor>& origin,
                                   const std::optional<int64_t>& window) {
  float_dtype(op, "q", q.scalar_type());
  INT8_OPS_CHECK(q.dim() == 4 && q.size(2) >= 1 && q.size(2) <= kMaxDecodeQueries &&
                     q.size(3) >= 2 && q.size(3) % 2 == 0,
                 op, ": expected q of shape [B, H, q_len, d] with q_len from 1 to ",
                 kMaxDecodeQueries, " and an even d, got ", shape_string(q));
  check_latent_stream(op, k, q);
  check_latent_stream(op, v, q);
  const Tensor& latent = k.q[0];
  bool same = true;
  for (int64_t i = 0; i < 3; ++i) same = same && latent.size(i) == v.q[0].size(i);
  const int64_t kv_heads = k.a[0].size(0) * k.a[0].size(1) / q.size(3);
  INT8_OPS_CHECK(same && k.a[0].size(1) == v.a[0].size(1) && q.size(1) % kv_heads == 0, op,
                 ": expected k and v of the same B, G, S and heads, which divide q's ", q.size(1),
                 ", got latents ", shape_string(latent), " and ", shape_string(v.q[0]), ", A ",
                 shape_string(k.a[0]), " and ", shape_string(v.a[0]));
  check_dtype(op, "inv_freq", inv_freq, ScalarType::Float);
  INT8_OPS_CHECK(inv_freq.dim() == 1 && inv_freq.size(0) == q.size(3) / 2, op,
                 ": expected inv_freq of shape [", q.size(3) / 2, "], got ",
                 shape_string(inv_freq));
  check_same_device(op, "inv_freq", inv_freq, q, "q");
  check_row_numbers(op, "start", start, q);
  check_row_numbers(op, "length", length, q);
  if (origin.has_value()) check_row_numbers(op, "origin", *origin, q);
  INT8_OPS_CHECK(!window.has_value() || *window >= 1, op, ": expected a window of at least 1, got ",
                 window.value_or(0));
}

}  // namespace int8_ops
