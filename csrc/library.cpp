// Every schema of the library, and nothing else. CPU kernels register in cpu/ops.cpp, CUDA ones in
// cuda/ops.cpp (module _C_cuda); shapes for tracing are in int8_ops/_fake.py.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(int8_ops, m) {
  m.def("quantize_per_token(Tensor x) -> (Tensor q, Tensor scale)");
  m.def("quantize_per_channel(Tensor w, int axis=0) -> (Tensor q, Tensor scale)");
  m.def("dequantize(Tensor q, Tensor scale, ScalarType dtype) -> Tensor");
  m.def("int8_mm(Tensor a, Tensor w) -> Tensor");
  m.def(
      "int8_scaled_mm(Tensor a, Tensor w, Tensor a_scale, Tensor w_scale, Tensor? bias, "
      "ScalarType out_dtype) -> Tensor");
  m.def(
      "int8_linear(Tensor x, Tensor w, Tensor w_scale, Tensor? bias, "
      "ScalarType? out_dtype=None) -> Tensor");
  // Lists: one entry a slice of a latent. Bits are not named: a slice whose rows are half as wide
  // as its A holds two int4 values a byte.
  m.def(
      "latent_attention_decode(Tensor q, "
      "Tensor[] k, Tensor[] k_scale, Tensor[] a_k, Tensor[] a_k_scale, Tensor? k_bias, "
      "Tensor[] v, Tensor[] v_scale, Tensor[] a_v, Tensor[] a_v_scale, Tensor? v_bias, "
      "Tensor inv_freq, Tensor start, Tensor length, Tensor? origin, "
      "float scaling, float rope_scaling=1.0, int? window=None) -> Tensor");
  // Bits are named: the widths alone don't say how a latent is cut into slices.
  m.def(
      "latent_append(Tensor k, Tensor v, Tensor slots, int[] k_bits, int[] v_bits, "
      "Tensor(a!)[] k_q, Tensor(b!)[] k_scale, Tensor(c!)[] v_q, Tensor(d!)[] v_scale) -> ()");
}

// The module holds no Python function: importing it loads the library, whose static initialisers
// register the ops above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
