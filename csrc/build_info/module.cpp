// int8_ops._build: what was compiled, told without torch and without a GPU. Plain limited C API, so
// that one binary serves every Python the wheel serves.
#include <Python.h>

#include <cstdarg>
#include <exception>
#include <iterator>
#include <string>
#include <vector>

#include "../common/numerics.h"
#include "../cpu/isa.h"
#include "../cuda/arch_list.h"
#include "../cuda/heuristics/gemm_heuristics.h"
#include "../cuda/heuristics/panel_tiles.h"
#include "../cuda/heuristics/skinny_tiles.h"
#include "../cuda/heuristics/sm90_tiles.h"

#ifndef INT8_OPS_VERSION
#error "setup.py defines INT8_OPS_VERSION"
#endif

namespace {

// Appends an item that is new, or null after an error. False, and the list is gone, on an error.
bool append_new(PyObject*& list, PyObject* item) {
  const bool done = list != nullptr && item != nullptr && PyList_Append(list, item) == 0;
  Py_XDECREF(item);
  if (!done) Py_CLEAR(list);
  return done;
}

PyObject* to_list(const std::vector<std::string>& items) {
  PyObject* list = PyList_New(0);
  for (const std::string& item : items) {
    if (!append_new(list, PyUnicode_FromString(item.c_str()))) break;
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

// CPython's declaration wants pointers to char that it never writes through.
bool parse(PyObject* args, PyObject* keywords, const char* format, const char* const* names, ...) {
  va_list targets;
  va_start(targets, names);
  const int parsed =
      PyArg_VaParseTupleAndKeywords(args, keywords, format, const_cast<char**>(names), targets);
  va_end(targets);
  return parsed != 0;
}

// The plans for a problem on a device, cheapest first.
PyObject* rank_gemm_plans(PyObject*, PyObject* args, PyObject* keywords) {
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
  static constexpr const char* kNames[] = {
      "m",       "n",    "k",    "out_bytes", "sm_count", "shared_bytes",
      "aligned", "wide", "sm90", "x_bytes",   nullptr};
  if (!parse(args, keywords, "LLLLii|pppL", kNames, &m, &n, &k, &out_bytes, &sm_count,
             &shared_bytes, &aligned, &wide, &sm90, &x_bytes)) {
    return nullptr;
  }
  if (m < 1 || n < 1 || k < 1 || out_bytes < 1 || sm_count < 1) {
    PyErr_SetString(PyExc_ValueError, "m, n, k, out_bytes and sm_count must be at least 1");
    return nullptr;
  }
  if (x_bytes != 0 && x_bytes != 2 && x_bytes != 4) {
    PyErr_SetString(PyExc_ValueError, "x_bytes must be 2 or 4, or 0 where x is int8 already");
    return nullptr;
  }
  try {
    const auto plans =
        int8_ops::cuda::rank_gemm_plans({m, n, k, out_bytes, aligned != 0, wide != 0, x_bytes},
                                        {sm_count, shared_bytes, sm90 != 0});
    PyObject* list = PyList_New(0);
    for (const auto& plan : plans) {
      if (!append_new(list, plan_to_dict(plan))) break;
    }
    return list;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* gemm_paths(PyObject*, PyObject*) {
  return to_list({std::begin(int8_ops::cuda::kGemmPathNames),  //
                  std::end(int8_ops::cuda::kGemmPathNames)});
}

// Geometry of every instantiated tile, in the order of GemmPlan::tile.
PyObject* gemm_tiles(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  for (const auto& tile : int8_ops::cuda::kGemmTiles) {
    PyObject* item =
        Py_BuildValue("{s:i,s:i,s:i,s:i,s:i,s:i,s:O}", "block_m", tile.block_m, "block_n",
                      tile.block_n, "block_k", tile.block_k(), "threads", tile.threads(), "stages",
                      tile.stages, "shared_bytes", tile.shared_bytes(tile.stages),
                      "serves_unaligned", tile.serves_unaligned() ? Py_True : Py_False);
    if (!append_new(list, item)) break;
  }
  return list;
}

bool in_range(long long m, long long k) {
  if (m >= 1 && k >= 1 && k <= int8_ops::kMaxK) return true;
  PyErr_SetString(PyExc_ValueError, "m must be at least 1, k at least 1 and at most the longest K");
  return false;
}

PyObject* skinny_tiles(PyObject*, PyObject* args, PyObject* keywords) {
  long long m = 1;
  long long k = 1024;
  static constexpr const char* kNames[] = {"m", "k", nullptr};
  if (!parse(args, keywords, "|LL", kNames, &m, &k) || !in_range(m, k)) return nullptr;
  PyObject* list = PyList_New(0);
  for (const auto& tile : int8_ops::cuda::kSkinnyTiles) {
    PyObject* item = Py_BuildValue(
        "{s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:L}", "rows", tile.rows, "cols", tile.cols(), "warps_n",
        tile.warps_n, "warps_k", tile.warps_k, "steps", tile.steps, "threads", tile.threads(),
        "blocks_per_sm", tile.blocks_per_sm, "fixed_bytes", tile.fixed_bytes(), "shared_bytes",
        static_cast<long long>(tile.shared_bytes(m, k)));
    if (!append_new(list, item)) break;
  }
  return list;
}

// What a block of an H100 or H200 may have at most.
constexpr int kHopperSharedBytes = 232448;

PyObject* resident_tiles(PyObject*, PyObject* args, PyObject* keywords) {
  long long k = int8_ops::cuda::kMaxResidentK;
  int limit = kHopperSharedBytes;
  int buffers = 1;
  static constexpr const char* kNames[] = {"k", "shared_limit", "buffers", nullptr};
  if (!parse(args, keywords, "|Lii", kNames, &k, &limit, &buffers) || !in_range(1, k)) {
    return nullptr;
  }
  using int8_ops::cuda::ResidentTile;
  PyObject* list = PyList_New(0);
  for (const ResidentTile& tile : int8_ops::cuda::kResidentTiles) {
    const auto shared = tile.shared(k, buffers, limit);
    PyObject* item = Py_BuildValue(
        "{s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i}", "block_m", ResidentTile::kBlockM, "block_n",
        tile.block_n, "block_k", ResidentTile::kBlockK, "threads", ResidentTile::kThreads,
        "staged_cols", tile.staged_cols, "ahead", tile.ahead, "stages", shared.stages,
        "factor_slots", shared.factor_slots, "shared_bytes", shared.bytes);
    if (!append_new(list, item)) break;
  }
  return list;
}

PyObject* stream_tiles(PyObject*, PyObject* args, PyObject* keywords) {
  long long k = 4096;
  int limit = kHopperSharedBytes;
  static constexpr const char* kNames[] = {"k", "shared_limit", nullptr};
  if (!parse(args, keywords, "|Li", kNames, &k, &limit) || !in_range(1, k)) return nullptr;
  using int8_ops::cuda::StreamTile;
  PyObject* list = PyList_New(0);
  for (const StreamTile& tile : int8_ops::cuda::kStreamTiles) {
    const auto shared = tile.shared(k, limit);
    PyObject* item = Py_BuildValue(
        "{s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i}", "block_m", StreamTile::kBlockM, "block_n",
        tile.block_n, "block_k", StreamTile::kBlockK, "threads", StreamTile::kThreads,
        "staged_cols", tile.staged_cols(), "cluster_m", tile.cluster_m, "cluster_n", tile.cluster_n,
        "group_m", tile.group_m, "stages", shared.stages, "factor_slots", shared.factor_slots,
        "shared_bytes", shared.bytes);
    if (!append_new(list, item)) break;
  }
  return list;
}

PyObject* stationary_tiles(PyObject*, PyObject* args, PyObject* keywords) {
  long long n = 1024;
  long long k = int8_ops::cuda::StationaryTile::kMaxK;
  int limit = kHopperSharedBytes;
  static constexpr const char* kNames[] = {"n", "k", "shared_limit", nullptr};
  if (!parse(args, keywords, "|LLi", kNames, &n, &k, &limit) || !in_range(1, n) ||
      !in_range(1, k)) {
    return nullptr;
  }
  using int8_ops::cuda::StationaryTile;
  if (k > StationaryTile::kMaxK) k = StationaryTile::kMaxK;
  PyObject* list = PyList_New(0);
  for (const StationaryTile& tile : int8_ops::cuda::kStationaryTiles) {
    const auto shared = tile.shared(n, k, limit);
    PyObject* item = Py_BuildValue(
        "{s:i,s:i,s:i,s:i,s:i,s:i,s:L,s:i,s:i,s:i}", "block_m", StationaryTile::kBlockM,
        "unit_columns", StationaryTile::kUnitColumns, "block_k", StationaryTile::kBlockK, "threads",
        StationaryTile::kThreads, "cluster", tile.cluster, "units", tile.units(n, k), "parts",
        static_cast<long long>(tile.parts(n, k)), "row_buffers", shared.stages, "shared_bytes",
        shared.bytes, "max_k", StationaryTile::kMaxK);
    if (!append_new(list, item)) break;
  }
  return list;
}

PyObject* panel_tiles(PyObject*, PyObject*) {
  using int8_ops::cuda::PanelTile;
  PyObject* list = PyList_New(0);
  for (const PanelTile& tile : int8_ops::cuda::kPanelTiles) {
    PyObject* item = Py_BuildValue("{s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i}", "rows", tile.rows, "cols",
                                   tile.cols, "cluster", tile.cluster, "threads",
                                   PanelTile::kThreads, "blocks_per_sm", PanelTile::kBlocksPerSm,
                                   "shared_bytes", tile.shared_bytes(), "max_k", PanelTile::kMaxK,
                                   "max_rows", static_cast<int>(int8_ops::cuda::kMaxPanelRows));
    if (!append_new(list, item)) break;
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

using Keywords = PyObject* (*)(PyObject*, PyObject*, PyObject*);

// As CPython has it: how a function is called, the flags say.
PyCFunction with_keywords(Keywords function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}
constexpr int kKeywords = METH_VARARGS | METH_KEYWORDS;

PyMethodDef kMethods[] = {
    {"info", info, METH_NOARGS, "Facts of the build: versions, compiled CUDA architectures."},
    {"cpu_isas", cpu_isas, METH_NOARGS, "Instruction sets usable on this machine, worst first."},
    {"cpu_isa", cpu_isa, METH_NOARGS, "The instruction set the CPU kernels use."},
    {"gemm_paths", gemm_paths, METH_NOARGS,
     "The paths of CUDA matmuls, by INT8_OPS_GEMM_PATH's names."},
    {"gemm_tiles", gemm_tiles, METH_NOARGS, "Geometry of every tile of the path sm80."},
    {"skinny_tiles", with_keywords(skinny_tiles), kKeywords,
     "(m=1, k=1024) -> geometry of every tile of the path skinny, and the shared memory of a block "
     "that has m rows of k."},
    {"resident_tiles", with_keywords(resident_tiles), kKeywords,
     "(k=1024, shared_limit=232448, buffers=1) -> geometry of every tile of the path resident, and "
     "how a block divides its shared memory for so many sets of rows of k; no stages: no room."},
    {"stream_tiles", with_keywords(stream_tiles), kKeywords,
     "(k=4096, shared_limit=232448) -> geometry of every tile of the path stream, and how a block "
     "divides its shared memory."},
    {"stationary_tiles", with_keywords(stationary_tiles), kKeywords,
     "(n=1024, k=512, shared_limit=232448) -> geometry of every tile of the path stationary, the "
     "tiles of columns a block holds of n, how many clusters that takes, and how many tiles of "
     "rows "
     "fit beside them; k above max_k counts as max_k."},
    {"panel_tiles", panel_tiles, METH_NOARGS,
     "Geometry of every tile of the path panel, and the most rows and the longest K that it "
     "takes."},
    {"rank_gemm_plans", with_keywords(rank_gemm_plans), kKeywords,
     "(m, n, k, out_bytes, sm_count, shared_bytes, aligned=True, wide=True, sm90=False, x_bytes=0) "
     "-> plans for a CUDA matmul, cheapest first.\n\n"
     "aligned: every row of x (or a) and of w starts 16-byte aligned. wide: n is a multiple of 8, "
     "and the output, the scales and the bias start 16-byte aligned. sm90: the device has "
     "capability 9.0 and the build code for 9.0a. x_bytes: of an element of x, which is to be "
     "quantized; 0 where int8 rows are given."},
    {"why_not_runnable", why_not_runnable, METH_VARARGS,
     "(archs, major, minor) -> why a device of that capability can't run them, or an empty text."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT, "_build", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__build() { return PyModule_Create(&kModule); }
