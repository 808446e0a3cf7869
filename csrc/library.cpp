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
}

// The module holds no Python function: importing it loads the library, whose static initialisers
// register the ops above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
