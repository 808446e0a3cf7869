// The body of every op, once for all devices: check, allocate, fill a params struct, run.
//
// A device supplies a policy type (see cpu/ops.cpp and cuda/ops.cpp):
//   struct Policy {
//     struct Guard { explicit Guard(const Tensor&); };   // makes the tensor's device current
//     static ExecContext context(const Tensor&);         // device index and current stream
//     static void quantize(const QuantizeParams&);
//     static void dequantize(const DequantizeParams&);
//     static int64_t matmul_workspace_bytes(MatmulParams&);   // may note a plan in the params
//     static void matmul(MatmulParams&);                     // with x set: quantizes it too
//     static int64_t latent_attention_workspace_bytes(LatentAttentionParams&);
//     static void latent_attention(LatentAttentionParams&);
//     static void latent_append(const LatentAppendParams&);
//   };
// Non-contiguous inputs are copied to contiguous ones first; the kernels see row-major data only.
#pragma once

#include <array>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"

namespace int8_ops {

// The sizes of a tensor to be made, without a heap allocation.
class Sizes {
 public:
  Sizes(std::initializer_list<int64_t> sizes) {
    for (const int64_t size : sizes) values_[count_++] = size;
  }
  // Those of t, with another last one.
  Sizes(const Tensor& t, int64_t last) : count_(t.dim()) {
    INT8_OPS_CHECK(count_ <= kMaxDims, "tensor: expected at most ", kMaxDims, " dimensions, got ",
                   count_);
    for (int64_t i = 0; i + 1 < count_; ++i) values_[i] = t.size(i);
    values_[count_ - 1] = last;
  }
  int64_t count() const { return count_; }
  const int64_t* data() const { return values_.data(); }

  static constexpr int64_t kMaxDims = 64;  // as in torch

 private:
  std::array<int64_t, kMaxDims> values_;
  int64_t count_ = 0;
};

// An uninitialised contiguous tensor beside `like`. Calls the C shim directly: the dispatcher's
// lookup by name would cost more than the allocation.
inline Tensor empty_on_device_of(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  std::array<int64_t, Sizes::kMaxDims> strides;
  int64_t step = 1;
  for (int64_t i = sizes.count(); i-- > 0;) {
    strides[i] = step;
    step *= sizes.data()[i] > 0 ? sizes.data()[i] : 1;
  }
  int32_t device_type = 0;
  int32_t device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.count(), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      device_index, &handle));
  return Tensor(handle);
}

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

template <typename Policy>
struct OpImpl {
  static std::tuple<Tensor, Tensor> quantize_per_token(const Tensor& x) {
    constexpr const char* kOp = "quantize_per_token";
    const RowsCols shape = rows_cols(kOp, "x", x);
    const DType dtype = float_dtype(kOp, "x", x.scalar_type());
    typename Policy::Guard guard(x);
    const Tensor x_c = as_contiguous(x);
    Tensor q = empty_on_device_of(x, Sizes(x, shape.cols), ScalarType::Char);
    Tensor scale = empty_on_device_of(x, Sizes(x, 1), ScalarType::Float);
    run_quantize(x_c, dtype, q, scale, shape, /*scale_per_col=*/false);
    return {q, scale};
  }

  static std::tuple<Tensor, Tensor> quantize_per_channel(const Tensor& w, int64_t axis) {
    constexpr const char* kOp = "quantize_per_channel";
    INT8_OPS_CHECK(w.dim() == 2, kOp, ": expected w of shape [N, K], got ", shape_string(w));
    INT8_OPS_CHECK(axis >= -2 && axis <= 1, kOp, ": expected axis 0 or 1 (or -2, -1), got ", axis);
    const RowsCols shape = rows_cols(kOp, "w", w);
    const DType dtype = float_dtype(kOp, "w", w.scalar_type());
    const bool per_col = axis == 1 || axis == -1;
    INT8_OPS_CHECK(!per_col || shape.rows > 0, kOp,
                   ": expected at least one row for scales a column, got ", shape_string(w));
    typename Policy::Guard guard(w);
    const Tensor w_c = as_contiguous(w);
    Tensor q = empty_on_device_of(w, Sizes{shape.rows, shape.cols}, ScalarType::Char);
    Tensor scale = per_col ? empty_on_device_of(w, Sizes{1, shape.cols}, ScalarType::Float)
                           : empty_on_device_of(w, Sizes{shape.rows, 1}, ScalarType::Float);
    run_quantize(w_c, dtype, q, scale, shape, per_col);
    return {q, scale};
  }

  static Tensor dequantize(const Tensor& q, const Tensor& scale, ScalarType dtype) {
    constexpr const char* kOp = "dequantize";
    check_dtype(kOp, "q", q, ScalarType::Char);
    check_dtype(kOp, "scale", scale, ScalarType::Float);
    check_same_device(kOp, "scale", scale, q, "q");
    const RowsCols shape = rows_cols(kOp, "q", q);
    DequantizeParams p;
    p.out_dtype = float_dtype(kOp, "dtype", dtype);
    p.scale_per_col = check_dequantize_scale(kOp, q, scale);
    typename Policy::Guard guard(q);
    const Tensor q_c = as_contiguous(q);
    const Tensor scale_c = as_contiguous(scale);
    Tensor out = empty_on_device_of(q, Sizes(q, shape.cols), dtype);
    p.q = q_c.const_data_ptr<int8_t>();
    p.scale = scale_c.const_data_ptr<float>();
    p.out = out.mutable_data_ptr();
    p.rows = shape.rows;
    p.cols = shape.cols;
    p.ctx = Policy::context(q);
    if (p.rows > 0) Policy::dequantize(p);
    return out;
  }

  static Tensor int8_mm(const Tensor& a, const Tensor& w) {
    constexpr const char* kOp = "int8_mm";
    const MatmulShape shape = check_matmul_shape(kOp, "a", a, w);
    check_dtype(kOp, "a", a, ScalarType::Char);
    typename Policy::Guard guard(a);
    const Tensor a_c = as_contiguous(a);
    const Tensor w_c = as_contiguous(w);
    Tensor out = empty_on_device_of(a, Sizes(a, shape.n), ScalarType::Int);
    MatmulParams p = matmul_params(shape, w_c, out, DType::kInt32);
    p.a = a_c.const_data_ptr<int8_t>();
    run_matmul(p, out);
    return out;
  }

  static Tensor int8_scaled_mm(const Tensor& a, const Tensor& w, const Tensor& a_scale,
                               const Tensor& w_scale, const std::optional<Tensor>& bias,
                               ScalarType out_dtype) {
    constexpr const char* kOp = "int8_scaled_mm";
    const MatmulShape shape = check_matmul_shape(kOp, "a", a, w);
    check_dtype(kOp, "a", a, ScalarType::Char);
    check_a_scale(kOp, a_scale, a);
    check_w_scale(kOp, w_scale, w);
    check_bias(kOp, bias, w);
    const DType out_type = float_dtype(kOp, "out_dtype", out_dtype);
    typename Policy::Guard guard(a);
    const Tensor a_c = as_contiguous(a);
    const Tensor w_c = as_contiguous(w);
    const Tensor a_scale_c = as_contiguous(a_scale);
    const Epilogue epilogue(w_scale, bias);
    Tensor out = empty_on_device_of(a, Sizes(a, shape.n), out_dtype);
    MatmulParams p = matmul_params(shape, w_c, out, out_type);
    p.a = a_c.const_data_ptr<int8_t>();
    p.a_scale = a_scale_c.const_data_ptr<float>();
    epilogue.fill(p);
    run_matmul(p, out);
    return out;
  }

  static Tensor int8_linear(const Tensor& x, const Tensor& w, const Tensor& w_scale,
                            const std::optional<Tensor>& bias,
                            std::optional<ScalarType> out_dtype) {
    constexpr const char* kOp = "int8_linear";
    const MatmulShape shape = check_matmul_shape(kOp, "x", x, w);
    const DType x_type = float_dtype(kOp, "x", x.scalar_type());
    check_w_scale(kOp, w_scale, w);
    check_bias(kOp, bias, w);
    const ScalarType out_scalar = out_dtype.value_or(x.scalar_type());
    const DType out_type = float_dtype(kOp, "out_dtype", out_scalar);
    typename Policy::Guard guard(x);
    const Tensor x_c = as_contiguous(x);
    const Tensor w_c = as_contiguous(w);
    const Epilogue epilogue(w_scale, bias);
    Tensor out = empty_on_device_of(x, Sizes(x, shape.n), out_scalar);
    MatmulParams p = matmul_params(shape, w_c, out, out_type);
    p.x = x_c.const_data_ptr();
    p.x_dtype = x_type;
    epilogue.fill(p);
    run_matmul(p, out);
    return out;
  }

  static Tensor latent_attention_decode(
      const Tensor& q, const std::vector<Tensor>& k, const std::vector<Tensor>& k_scale,
      const std::vector<Tensor>& a_k, const std::vector<Tensor>& a_k_scale,
      const std::optional<Tensor>& k_bias, const std::vector<Tensor>& v,
      const std::vector<Tensor>& v_scale, const std::vector<Tensor>& a_v,
      const std::vector<Tensor>& a_v_scale, const std::optional<Tensor>& v_bias,
      const Tensor& inv_freq, const Tensor& start, const Tensor& length,
      const std::optional<Tensor>& origin, double scaling, double rope_scaling,
      std::optional<int64_t> window) {
    constexpr const char* kOp = "latent_attention_decode";
    const StreamTensors keys = {"k", k, k_scale, a_k, a_k_scale, k_bias};
    const StreamTensors values = {"v", v, v_scale, a_v, a_v_scale, v_bias};
    check_latent_attention(kOp, q, keys, values, inv_freq, start, length, origin, window);
    typename Policy::Guard guard(q);
    std::vector<Tensor> kept;  // copies live until the kernel is launched
    const auto keep = [&](const Tensor& t) -> const Tensor& {
      return kept.emplace_back(as_contiguous(t));
    };
    LatentAttentionParams p;
    p.batch = q.size(0);
    p.heads = q.size(1);
    p.q_len = q.size(2);
    p.head_dim = q.size(3);
    p.groups = k[0].size(1);
    p.capacity = k[0].size(2);
    p.kv_heads = p.groups * a_k[0].size(1) / p.head_dim;
    p.window = window.value_or(0);
    p.scaling = static_cast<float>(scaling * rope_scaling);
    fill_stream(keys, p.k, kept);
    fill_stream(values, p.v, kept);
    const Tensor q_rows = q.stride(3) == 1 ? q : as_contiguous(q);
    p.q = q_rows.const_data_ptr();
    p.q_dtype = float_dtype(kOp, "q", q.scalar_type());
    p.q_batch_stride = q_rows.stride(0);
    p.q_head_stride = q_rows.stride(1);
    p.q_token_stride = q_rows.stride(2);
    p.inv_freq = keep(inv_freq).template const_data_ptr<float>();
    p.start = keep(start).template const_data_ptr<int32_t>();
    p.length = keep(length).template const_data_ptr<int32_t>();
    if (origin.has_value()) p.origin = keep(*origin).template const_data_ptr<int32_t>();
    Tensor out =
        empty_on_device_of(q, Sizes{p.batch, p.q_len, p.heads, p.head_dim}, q.scalar_type());
    if (p.batch == 0 || p.heads == 0) return out;
    p.out = out.mutable_data_ptr();
    p.ctx = Policy::context(q);
    const Tensor scratch =
        empty_on_device_of(q, Sizes{Policy::latent_attention_workspace_bytes(p)}, ScalarType::Byte);
    p.workspace = scratch.mutable_data_ptr();
    Policy::latent_attention(p);
    return out;
  }

  static void latent_append(const Tensor& k, const Tensor& v, const Tensor& slots,
                            const std::vector<int64_t>& k_bits, const std::vector<int64_t>& v_bits,
                            const std::vector<Tensor>& k_q, const std::vector<Tensor>& k_scale,
                            const std::vector<Tensor>& v_q, const std::vector<Tensor>& v_scale) {
    constexpr const char* kOp = "latent_append";
    check_append_stream(kOp, "k", k, k, k_bits, k_q, k_scale);
    check_append_stream(kOp, "v", v, k, v_bits, v_q, v_scale);
    check_same_device(kOp, "v", v, k, "k");
    bool same = v_q[0].size(2) == k_q[0].size(2);
    for (int64_t i = 0; i < 3; ++i) same = same && k.size(i) == v.size(i);
    INT8_OPS_CHECK(same, kOp, ": expected k and v of the same B, G, n and S, got ", shape_string(k),
                   " and ", shape_string(v), " for buffers ", shape_string(k_q[0]), " and ",
                   shape_string(v_q[0]));
    check_dtype(kOp, "slots", slots, ScalarType::Long);
    check_same_device(kOp, "slots", slots, k, "k");
    INT8_OPS_CHECK(slots.dim() == 1 && slots.size(0) == k.size(2), kOp,
                   ": expected slots of shape [", k.size(2), "], got ", shape_string(slots));
    typename Policy::Guard guard(k);
    const Tensor k_rows = k.stride(3) == 1 ? k : as_contiguous(k);
    const Tensor v_rows = v.stride(3) == 1 ? v : as_contiguous(v);
    const Tensor slots_c = as_contiguous(slots);
    LatentAppendParams p;
    p.batch = k.size(0);
    p.groups = k.size(1);
    p.tokens = k.size(2);
    p.capacity = k_q[0].size(2);
    if (p.batch * p.groups * p.tokens == 0) return;
    p.slots = slots_c.const_data_ptr<int64_t>();
    fill_new_latents(k_rows, k_bits, k_q, k_scale, p.k);
    fill_new_latents(v_rows, v_bits, v_q, v_scale, p.v);
    p.ctx = Policy::context(k);
    Policy::latent_append(p);
  }

 private:
  static void fill_new_latents(const Tensor& x, const std::vector<int64_t>& bits,
                               const std::vector<Tensor>& q, const std::vector<Tensor>& scale,
                               NewLatents& out) {
    out.x = x.const_data_ptr();
    out.dtype = float_dtype("latent_append", "latents", x.scalar_type());
    out.batch_stride = x.stride(0);
    out.group_stride = x.stride(1);
    out.token_stride = x.stride(2);
    out.count = static_cast<int64_t>(q.size());
    for (int64_t i = 0; i < out.count; ++i) {
      LatentSlots& slice = out.slices[i];
      slice.q = static_cast<int8_t*>(q[i].mutable_data_ptr());
      slice.q_batch_stride = q[i].stride(0);
      slice.q_group_stride = q[i].stride(1);
      slice.q_token_stride = q[i].stride(2);
      slice.scale = static_cast<float*>(scale[i].mutable_data_ptr());
      slice.scale_batch_stride = scale[i].stride(0);
      slice.scale_group_stride = scale[i].stride(1);
      slice.packed = bits[i] == 4;
      slice.rank = q[i].size(3) * (slice.packed ? 2 : 1);
    }
  }

  // Latents and their scales may be views into a larger cache; only rows that are not whole, or
  // scales that are not neighbours, are copied.
  static void fill_stream(const StreamTensors& s, LatentStream& out, std::vector<Tensor>& kept) {
    const auto keep = [&](const Tensor& t, bool as_it_is) -> const Tensor& {
      return kept.emplace_back(as_it_is ? t : as_contiguous(t));
    };
    out.count = static_cast<int64_t>(s.q.size());
    for (int64_t i = 0; i < out.count; ++i) {
      LatentSlice& slice = out.slices[i];
      const Tensor q = keep(s.q[i], s.q[i].stride(3) == 1);
      slice.q = q.const_data_ptr<int8_t>();
      slice.q_batch_stride = q.stride(0);
      slice.q_group_stride = q.stride(1);
      slice.q_token_stride = q.stride(2);
      const Tensor scale = keep(s.scale[i], s.scale[i].stride(2) == 1);
      slice.scale = scale.const_data_ptr<float>();
      slice.scale_batch_stride = scale.stride(0);
      slice.scale_group_stride = scale.stride(1);
      slice.a = keep(s.a[i], false).template const_data_ptr<int8_t>();
      slice.a_scale = keep(s.a_scale[i], false).template const_data_ptr<float>();
      slice.rank = s.a[i].size(2);
      slice.packed = s.q[i].size(3) != slice.rank;
    }
    if (!s.bias.has_value()) return;
    out.bias = keep(*s.bias, false).const_data_ptr();
    out.bias_dtype = float_dtype("bias", "bias", s.bias->scalar_type());
  }

  // Scale and bias made contiguous, kept alive while the kernel is launched.
  struct Epilogue {
    Epilogue(const Tensor& w_scale_in, const std::optional<Tensor>& bias_in)
        : w_scale(as_contiguous(w_scale_in)) {
      if (bias_in.has_value()) bias = as_contiguous(*bias_in);
    }
    void fill(MatmulParams& p) const {
      p.w_scale = w_scale.template const_data_ptr<float>();
      if (!bias.has_value()) return;
      p.bias = bias->const_data_ptr();
      p.bias_dtype = float_dtype("bias", "bias", bias->scalar_type());
    }
    Tensor w_scale;
    std::optional<Tensor> bias;
  };

  static MatmulParams matmul_params(const MatmulShape& shape, const Tensor& w, Tensor& out,
                                    DType out_dtype) {
    MatmulParams p;
    p.w = w.const_data_ptr<int8_t>();
    p.out = out.mutable_data_ptr();
    p.out_dtype = out_dtype;
    p.m = shape.m;
    p.n = shape.n;
    p.k = shape.k;
    p.ctx = Policy::context(w);
    return p;
  }

  static void run_matmul(MatmulParams& p, const Tensor& out) {
    if (p.m == 0 || p.n == 0) return;
    const int64_t bytes = Policy::matmul_workspace_bytes(p);
    std::optional<Tensor> scratch;
    if (bytes > 0) {
      scratch = empty_on_device_of(out, Sizes{bytes}, ScalarType::Byte);
      p.workspace = scratch->mutable_data_ptr();
    }
    Policy::matmul(p);
  }

  static void run_quantize(const Tensor& x, DType dtype, Tensor& q, Tensor& scale,
                           const RowsCols& shape, bool per_col) {
    if (shape.rows == 0) return;
    QuantizeParams p;
    p.x = x.const_data_ptr();
    p.x_dtype = dtype;
    p.q = q.mutable_data_ptr<int8_t>();
    p.scale = scale.mutable_data_ptr<float>();
    p.rows = shape.rows;
    p.cols = shape.cols;
    p.scale_per_col = per_col;
    p.ctx = Policy::context(x);
    Policy::quantize(p);
  }

  // True when the scale stands for a column. [..., 1] is a scale a row; [1, ..., 1, K] a column.
  static bool check_dequantize_scale(const char* op, const Tensor& q, const Tensor& scale) {
    const int64_t last = q.dim() - 1;
    bool per_row = scale.dim() == q.dim() && scale.size(last) == 1;
    bool per_col = scale.dim() == q.dim() && scale.size(last) == q.size(last);
    for (int64_t i = 0; i < last && scale.dim() == q.dim(); ++i) {
      per_row = per_row && scale.size(i) == q.size(i);
      per_col = per_col && scale.size(i) == 1;
    }
    INT8_OPS_CHECK(per_row || per_col, op,
                   ": expected scale of q's shape with a last dimension of 1 (a scale a row) or "
                   "with every dimension but the last of 1 (a scale a column), got scale ",
                   shape_string(scale), " for q ", shape_string(q));
    return !per_row;
  }
};

// Registers the ops that every device module has; Policy as above. What a policy lacks is not
// instantiated, so that a device may come without some of the others.
#define INT8_OPS_REGISTER_IMPLS(m, Policy)                                          \
  m.impl("quantize_per_token", TORCH_BOX(&OpImpl<Policy>::quantize_per_token));     \
  m.impl("quantize_per_channel", TORCH_BOX(&OpImpl<Policy>::quantize_per_channel)); \
  m.impl("dequantize", TORCH_BOX(&OpImpl<Policy>::dequantize));                     \
  m.impl("int8_mm", TORCH_BOX(&OpImpl<Policy>::int8_mm));                           \
  m.impl("int8_scaled_mm", TORCH_BOX(&OpImpl<Policy>::int8_scaled_mm));             \
  m.impl("int8_linear", TORCH_BOX(&OpImpl<Policy>::int8_linear))

}  // namespace int8_ops
