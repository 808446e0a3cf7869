// int8_ops._build: what was compiled, told without torch and without a GPU. Plain limited C API, so
// that one binary serves every Python the wheel serves.
#include <Python.h>

#include <exception>
#include <string>
#include <vector>

#include "../cpu/isa.h"

#ifndef INT8_OPS_VERSION
#error "setup.py defines INT8_OPS_VERSION"
#endif

namespace {

PyObject* to_list(const std::vector<std::string>& items) {
  PyObject* list = PyList_New(0);
  if (list == nullptr) return nullptr;
  for (const std::string& item : items) {
    PyObject* text = PyUnicode_FromString(item.c_str());
    if (text == nullptr || PyList_Append(list, text) != 0) {
      Py_XDECREF(text);
      Py_DECREF(list);
      return nullptr;
    }
    Py_DECREF(text);
  }
  return list;
}

// Facts of the build: strings that setup.py passed in.
PyObject* info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:s}", "version", INT8_OPS_VERSION, "torch",
                       INT8_OPS_BUILD_TORCH, "cuda", INT8_OPS_BUILD_CUDA, "cuda_archs",
                       INT8_OPS_BUILD_ARCHS, "cuda_skipped", INT8_OPS_BUILD_CUDA_SKIPPED);
}

PyObject* cpu_isas(PyObject*, PyObject*) { return to_list(int8_ops::cpu::supported_isas()); }

PyObject* cpu_isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(int8_ops::cpu::selected_isa().c_str());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef kMethods[] = {
    {"info", info, METH_NOARGS, "Facts of the build: versions, compiled CUDA architectures."},
    {"cpu_isas", cpu_isas, METH_NOARGS, "Instruction sets usable on this machine, worst first."},
    {"cpu_isa", cpu_isa, METH_NOARGS, "The instruction set the CPU kernels use."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_build", nullptr, -1,     kMethods,
                       nullptr,               nullptr,  nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__build() { return PyModule_Create(&kModule); }
