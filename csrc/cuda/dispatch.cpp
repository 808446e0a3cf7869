#include "dispatch.h"

#include <cuda_runtime.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>

#include "../common/quantized_rows.h"
#include "arch_list.h"
#include "heuristics/gemm_heuristics.h"
#include "quantize/quantize.h"
#include "sm80/gemm.h"

namespace int8_ops::cuda {
namespace {

constexpr size_t kMaxDevices = 64;  // as in launch.cuh

struct Device {
  DeviceFacts facts;
  std::string unsupported;  // empty, or why what was compiled can't run here
};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&value, which, device);
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("int8_ops: reading a device attribute failed: ") +
                             cudaGetErrorString(status));
  }
  return value;
}

const Device& device_of(const ExecContext& ctx) {
  static std::array<std::once_flag, kMaxDevices> once;
  static std::array<Device, kMaxDevices> devices;
  const auto index = static_cast<size_t>(ctx.device_index);
  Device& device = devices.at(index);
  std::call_once(once.at(index), [&] {
    const int id = ctx.device_index;
    device.facts.sm_count = attribute(cudaDevAttrMultiProcessorCount, id);
    device.facts.shared_bytes_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
    device.unsupported =
        why_not_runnable(INT8_OPS_BUILD_ARCHS, attribute(cudaDevAttrComputeCapabilityMajor, id),
                         attribute(cudaDevAttrComputeCapabilityMinor, id));
  });
  return device;
}

GemmProblem problem_of(const MatmulParams& p) {
  return {p.m, p.n, p.k, size_of(p.out_dtype), sm80::has_aligned_rows(p)};
}

// INT8_OPS_GEMM_CONFIG="tile:splits" forces a plan: for tests that must reach every tile, and for
// measuring. Read at each call, so that one process can try several.
bool forced_plan(GemmPlan& plan) {
  const char* text = std::getenv("INT8_OPS_GEMM_CONFIG");
  if (text == nullptr || *text == '\0') return false;
  int tile = -1;
  int splits = 0;
  int read = 0;
  if (std::sscanf(text, "%d:%d%n", &tile, &splits, &read) != 2 || text[read] != '\0' || tile < 0 ||
      tile >= static_cast<int>(kNumGemmTiles) || splits < 1) {
    throw std::runtime_error(
        "int8_ops: INT8_OPS_GEMM_CONFIG must be \"tile:splits\" with a tile of 0.." +
        std::to_string(kNumGemmTiles - 1) + ", got \"" + text + "\"");
  }
  plan = {tile, splits, 0.0};
  return true;
}

GemmPlan plan_for(const MatmulParams& p) {
  const GemmProblem problem = problem_of(p);
  GemmPlan forced;
  if (forced_plan(forced)) {
    if (!problem.aligned && !forced.geometry().serves_unaligned()) {
      throw std::runtime_error(
          "int8_ops: INT8_OPS_GEMM_CONFIG names " + describe(forced) +
          ", which takes no rows that start unaligned (K = " + std::to_string(p.k) + ")");
    }
    while (has_empty_split(forced.geometry(), p.k, forced.splits)) --forced.splits;
    return forced;
  }
  // A model calls with few shapes again and again.
  struct Entry {
    GemmProblem problem{-1, -1, -1, -1, false};
    int32_t device = -1;
    GemmPlan plan{};
  };
  thread_local std::array<Entry, 64> cache;
  const auto hash = static_cast<size_t>(p.m * 31 + p.n * 17 + p.k * 7 + size_of(p.out_dtype));
  Entry& entry = cache[(hash ^ (hash >> 8)) % cache.size()];
  if (entry.problem != problem || entry.device != p.ctx.device_index) {
    entry = {problem, p.ctx.device_index, select_gemm_plan(problem, device_of(p.ctx).facts)};
  }
  return entry.plan;
}

}  // namespace

void require_supported_device(const ExecContext& ctx) {
  const Device& device = device_of(ctx);
  if (!device.unsupported.empty()) throw std::runtime_error("int8_ops: " + device.unsupported);
}

int64_t matmul_workspace_bytes(MatmulParams& p) {
  const GemmPlan plan = plan_for(p);
  p.plan_tile = plan.tile;
  p.plan_splits = plan.splits;
  return gemm_workspace_bytes(problem_of(p), plan) +
         (p.x != nullptr ? quantized_rows_bytes(p) : 0);
}

void matmul(MatmulParams& p) {
  if (p.x != nullptr) quantize_rows(place_quantized_rows(p));
  const GemmPlan plan = {p.plan_tile, p.plan_splits, 0.0};
  static const bool print = [] {
    const char* wish = std::getenv("INT8_OPS_PRINT_CONFIG");
    return wish != nullptr && std::string(wish) == "1";
  }();
  if (print) {
    std::fprintf(stderr, "int8_ops: gemm m %lld n %lld k %lld: %s\n", static_cast<long long>(p.m),
                 static_cast<long long>(p.n), static_cast<long long>(p.k), describe(plan).c_str());
  }
  sm80::gemm(p, plan, device_of(p.ctx).facts.sm_count);
}

}  // namespace int8_ops::cuda
