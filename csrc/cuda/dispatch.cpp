#include "dispatch.h"

#include <cuda_runtime.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#include "../common/quantized_rows.h"
#include "arch_list.h"
#include "quantize/quantize.h"
#include "skinny/skinny.h"
#include "sm80/gemm.h"
#include "sm90/gemm.h"

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
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, id);
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor, id);
    device.unsupported = why_not_runnable(INT8_OPS_BUILD_ARCHS, major, minor);
    device.facts.sm90 =
        major == 9 && minor == 0 && holds_sm90a(INT8_OPS_BUILD_ARCHS) && sm90::has_code();
  });
  return device;
}

GemmProblem problem_of(const MatmulParams& p) {
  const void* const rows = p.x != nullptr ? p.x : p.a;
  const bool aligned = p.k % 16 == 0 && is_aligned(rows, 16) && is_aligned(p.w, 16);
  const bool wide =
      p.n % 8 == 0 && is_aligned(p.out, 16) && is_aligned(p.w_scale, 16) && is_aligned(p.bias, 16);
  const int64_t x_bytes = p.x != nullptr ? size_of(p.x_dtype) : 0;
  return {p.m, p.n, p.k, size_of(p.out_dtype), aligned, wide, x_bytes};
}

// For measuring, and for tests that must reach every tile; read at each call, so that one process
// can try several. INT8_OPS_GEMM_CONFIG="path:tile:splits" forces a plan (":pass" after it:
// x is quantized in a pass before), INT8_OPS_GEMM_PATH=path
// leaves the choice to the heuristics but for the path.
int32_t path_named(const std::string& name, const char* variable) {
  std::string known;
  for (int32_t i = 0; i < kNumGemmPaths; ++i) {
    if (name == kGemmPathNames[i]) return i;
    known += (i > 0 ? ", " : "") + std::string(kGemmPathNames[i]);
  }
  throw std::runtime_error(std::string("int8_ops: ") + variable + " names the path \"" + name +
                           "\"; known are " + known);
}

const char* setting(const char* variable) {
  const char* text = std::getenv(variable);
  return text == nullptr || *text == '\0' ? nullptr : text;
}

bool forced_plan(GemmPlan& plan) {
  constexpr const char* kVariable = "INT8_OPS_GEMM_CONFIG";
  const char* text = setting(kVariable);
  if (text == nullptr) return false;
  const char* colon = std::strchr(text, ':');
  int tile = -1;
  int splits = 0;
  int read = 0;
  const bool numbers =
      colon != nullptr && std::sscanf(colon, ":%d:%d%n", &tile, &splits, &read) == 2 && splits > 0;
  const std::string rest = numbers ? colon + read : "";
  if (!numbers || (!rest.empty() && rest != ":pass")) {
    throw std::runtime_error(std::string("int8_ops: ") + kVariable +
                             " must be \"path:tile:splits\" or \"path:tile:splits:pass\", got \"" +
                             text + "\"");
  }
  const auto path = static_cast<GemmPath>(path_named(std::string(text, colon), kVariable));
  if (tile < 0 || tile >= num_tiles(path)) {
    throw std::runtime_error(std::string("int8_ops: ") + kVariable + " must name a tile of 0.." +
                             std::to_string(num_tiles(path) - 1) + ", got \"" + text + "\"");
  }
  plan = {path, tile, splits, rest == ":pass", 0.0};
  return true;
}

GemmPlan plan_for(const MatmulParams& p) {
  const GemmProblem problem = problem_of(p);
  const DeviceFacts& device = device_of(p.ctx).facts;
  GemmPlan forced;
  if (forced_plan(forced)) {
    GemmProblem served = problem;
    if (forced.pass) served.x_bytes = 0;
    const std::string why = why_not_served(forced.path, forced.tile, served, device);
    if (!why.empty()) {
      throw std::runtime_error("int8_ops: INT8_OPS_GEMM_CONFIG names " + describe(forced) +
                               " for M = " + std::to_string(p.m) + ", N = " + std::to_string(p.n) +
                               ", K = " + std::to_string(p.k) + ", but " + why);
    }
    while (!is_useful_split(forced, problem)) --forced.splits;
    if (problem.x_bytes == 0) forced.pass = false;
    if (problem.x_bytes > 0 && forced.path == GemmPath::kSm80) forced.pass = true;
    return forced;
  }
  if (const char* name = setting("INT8_OPS_GEMM_PATH")) {
    const auto path = static_cast<GemmPath>(path_named(name, "INT8_OPS_GEMM_PATH"));
    for (const GemmPlan& plan : rank_gemm_plans(problem, device)) {
      if (plan.path == path) return plan;
    }
    throw std::runtime_error(std::string("int8_ops: INT8_OPS_GEMM_PATH=") + name +
                             " takes no problem of M = " + std::to_string(p.m) +
                             ", N = " + std::to_string(p.n) + ", K = " + std::to_string(p.k) +
                             ": " + why_not_served(path, 0, problem, device));
  }
  // A model calls with few shapes again and again.
  struct Entry {
    GemmProblem problem{-1, -1, -1, -1, false, false, 0};
    int32_t device = -1;
    GemmPlan plan{};
  };
  thread_local std::array<Entry, 64> cache;
  const auto hash = static_cast<size_t>(p.m * 31 + p.n * 17 + p.k * 7 + size_of(p.out_dtype));
  Entry& entry = cache[(hash ^ (hash >> 8)) % cache.size()];
  if (entry.problem != problem || entry.device != p.ctx.device_index) {
    entry = {problem, p.ctx.device_index, select_gemm_plan(problem, device)};
  }
  return entry.plan;
}

}  // namespace

void require_supported_device(const ExecContext& ctx) {
  const Device& device = device_of(ctx);
  if (!device.unsupported.empty()) throw std::runtime_error("int8_ops: " + device.unsupported);
}

const DeviceFacts& device_facts(const ExecContext& ctx) { return device_of(ctx).facts; }

int64_t matmul_workspace_bytes(MatmulParams& p) {
  const GemmPlan plan = plan_for(p);
  const GemmProblem problem = problem_of(p);
  p.plan_path = static_cast<int32_t>(plan.path);
  p.plan_tile = plan.tile;
  p.plan_splits = plan.splits;
  p.plan_pass = plan.pass;
  if (plan.path == GemmPath::kStream && p.x != nullptr && !plan.pass) {
    return sm90::stream_workspace_bytes(p);
  }
  if (plan.path == GemmPath::kStationary && !plan.pass) {
    return sm90::stationary_workspace_bytes(p, plan.tile, device_of(p.ctx).facts);
  }
  return gemm_workspace_bytes(problem, plan) + (plan.pass ? quantized_rows_bytes(p) : 0);
}

void matmul(MatmulParams& p) {
  const GemmPlan plan = {static_cast<GemmPath>(p.plan_path), p.plan_tile, p.plan_splits,
                         p.plan_pass, 0.0};
  const DeviceFacts& device = device_of(p.ctx).facts;
  static const bool print = [] {
    const char* wish = std::getenv("INT8_OPS_PRINT_CONFIG");
    return wish != nullptr && std::string(wish) == "1";
  }();
  if (print) {
    std::fprintf(stderr, "int8_ops: gemm m %lld n %lld k %lld: %s\n", static_cast<long long>(p.m),
                 static_cast<long long>(p.n), static_cast<long long>(p.k), describe(plan).c_str());
  }
  if (plan.pass) quantize_rows(place_quantized_rows(p));
  switch (plan.path) {
    case GemmPath::kSm80:
      return sm80::gemm(p, plan, device.sm_count);
    case GemmPath::kSkinny:
      return skinny::matmul(p, plan.tile, device);
    case GemmPath::kResident:
      return sm90::resident(p, plan.tile, plan.splits, device);
    case GemmPath::kStream:
      return sm90::stream(p, plan.tile, device);
    case GemmPath::kStationary:
      return sm90::stationary(p, plan.tile, device);
    case GemmPath::kPanel:
      return sm90::panel(p, plan.tile);
  }
}

}  // namespace int8_ops::cuda
