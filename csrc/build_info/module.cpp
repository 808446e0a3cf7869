// int8_ops._build: what was compiled, told without torch and without a GPU. Plain limited C API, so
// that one binary serves every Python the wheel serves.
#include <Python.h>

#include <exception>
#include <string>
#include <vector>

#include "../cpu/isa.h"
#include "../cuda/arch_list.h"
#include "../cuda/heuristics/gemm_heuristics.h"

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

PyObject* plan_to_dict(const int8_ops::cuda::GemmPlan& plan) {
  return Py_BuildValue("{s:s,s:i,s:i,s:O,s:d,s:s}", "path",
                       int8_ops::cuda::kGemmPathNames[static_cast<int>(plan.path)], "tile",
                       plan.tile, "splits", plan.splits, "pass", plan.pass ? Py_True : Py_False,
                       "cost", plan.cost, "text", int8_ops::cuda::describe(plan).c_str());
}

// The plans for a problem on a device, cheapest first.
PyObject* rank_gemm_plans(PyObject*, PyObject* args) {
  long long m = 0;
  long long n = 0;
  long long k = 0;
  long long out_bytes = 0;
  int sm_count = 0;
  int shared_bytes = 0;
  int aligned = 1;
  int wide = 1;
  int sm90 = 0;
  long long x_bytes = 0;
  if (!PyArg_ParseTuple(args, "LLLLii|pppL", &m, &n, &k, &out_bytes, &sm_count, &shared_bytes,
                        &aligned, &wide, &sm90, &x_bytes)) {
    return nullptr;
  }
  if (m < 1 || n < 1 || k < 1 || out_bytes < 1 || sm_count < 1) {
    PyErr_SetString(PyExc_ValueError, "m, n, k, out_bytes and sm_count must be at least 1");
    return nullptr;
  }
  try {
    const auto plans =
        int8_ops::cuda::rank_gemm_plans({m, n, k, out_bytes, aligned != 0, wide != 0, x_bytes},
                                        {sm_count, shared_bytes, sm90 != 0});
    PyObject* list = PyList_New(0);
    for (const auto& plan : plans) {
      PyObject* item = plan_to_dict(plan);
      if (list == nullptr || item == nullptr || PyList_Append(list, item) != 0) {
        Py_XDECREF(item);
        Py_XDECREF(list);
        return nullptr;
      }
      Py_DECREF(item);
    }
    return list;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// Geometry of every instantiated tile, in the order of GemmPlan::tile.
PyObject* gemm_tiles(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  if (list == nullptr) return nullptr;
  for (const auto& tile : int8_ops::cuda::kGemmTiles) {
    PyObject* item =
        Py_BuildValue("{s:i,s:i,s:i,s:i,s:i,s:i,s:O}", "block_m", tile.block_m, "block_n",
                      tile.block_n, "block_k", tile.block_k(), "threads", tile.threads(), "stages",
                      tile.stages, "shared_bytes", tile.shared_bytes(tile.stages),
                      "serves_unaligned", tile.serves_unaligned() ? Py_True : Py_False);
    if (item == nullptr || PyList_Append(list, item) != 0) {
      Py_XDECREF(item);
      Py_DECREF(list);
      return nullptr;
    }
    Py_DECREF(item);
  }
  return list;
}

// Empty, or the sentence that says why a device of (major, minor) can't run the compiled archs.
PyObject* why_not_runnable(PyObject*, PyObject* args) {
  const char* archs = nullptr;
  int major = 0;
  int minor = 0;
  if (!PyArg_ParseTuple(args, "sii", &archs, &major, &minor)) return nullptr;
  return PyUnicode_FromString(int8_ops::cuda::why_not_runnable(archs, major, minor).c_str());
}

PyMethodDef kMethods[] = {
    {"info", info, METH_NOARGS, "Facts of the build: versions, compiled CUDA architectures."},
    {"cpu_isas", cpu_isas, METH_NOARGS, "Instruction sets usable on this machine, worst first."},
    {"cpu_isa", cpu_isa, METH_NOARGS, "The instruction set the CPU kernels use."},
    {"gemm_tiles", gemm_tiles, METH_NOARGS, "Geometry of every instantiated CUDA GEMM tile."},
    {"rank_gemm_plans", rank_gemm_plans, METH_VARARGS,
     "(m, n, k, out_bytes, sm_count, shared_bytes, aligned=True) -> plans for the CUDA GEMM, "
     "cheapest first."},
    {"why_not_runnable", why_not_runnable, METH_VARARGS,
     "(archs, major, minor) -> why a device of that capability can't run them, or an empty text."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT, "_build", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__build() { return PyModule_Create(&kModule); }
