#include "gemm_heuristics.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <sstream>
#include <stdexcept>

namespace int8_ops::cuda {
namespace {

constexpr std::array<int32_t, 6> kSplitCandidates = {1, 2, 4, 8, 16, 32};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Note [Cost model]
// A plan's time in multiprocessor cycles, from the busiest multiprocessor's share of the tiles:
//   - products, at the tile's measured rate; a K-block takes kKBlockLatency at least, however
//   small;
//   - the stores of a tile and a fixed price for its beginning, part of which hides behind another
//     block on the same multiprocessor;
//   - a launch, and for a split a second one with the slabs' traffic.
// Never less than the bytes that must cross device memory. Only the order of the costs matters: the
// constants were set so that the choice is the best measured tile, or within a few percent of it,
// on the shapes of benchmarks/bench_linear.py (H200).
constexpr double kOpsPerCycle = 5000;
constexpr double kKBlockLatency = 700;
constexpr double kStoreBytesPerCycle = 18;
constexpr double kTileCycles = 1500;
constexpr double kUnsharedCycles = 500;  // more where no other block shares the multiprocessor
constexpr double kKWarpsCycles = 700;    // meeting of the K-warps
constexpr double kHiddenShare = 0.3;
constexpr double kLaunchCycles = 4000;
constexpr double kSplitCycles = 3600;
constexpr double kDeviceBytesPerCycle = 2100;

double plan_cost(const GemmProblem& p, const DeviceFacts& device, const GemmTile& tile,
                 int32_t splits) {
  const int64_t works = ceil_div(p.m, tile.block_m) * ceil_div(p.n, tile.block_n) * splits;
  const auto share = static_cast<double>(ceil_div(works, device.sm_count));
  const auto k_blocks = static_cast<double>(k_blocks_per_split(tile, p.k, splits));
  const double out_bytes = splits > 1 ? 4.0 : static_cast<double>(p.out_bytes);

  const double products =
      2.0 * tile.block_m * tile.block_n * tile.block_k() / (kOpsPerCycle * tile.rate / 100.0);
  const double turns = std::ceil(share / tile.blocks_per_sm);
  const double main = k_blocks * std::max(share * products, turns * kKBlockLatency);

  const bool shared = tile.blocks_per_sm > 1 && share > 1;
  const double rows = static_cast<double>(std::min<int64_t>(p.m, tile.block_m));
  double around = rows * tile.block_n * out_bytes / kStoreBytesPerCycle + kTileCycles;
  if (tile.blocks_per_sm == 1) around += kUnsharedCycles;
  if (tile.warps_k > 1) around += kKWarpsCycles;
  if (shared) around *= 1.0 - kHiddenShare;

  const double bytes =
      static_cast<double>(p.m * p.k + p.n * p.k) + static_cast<double>(p.m * p.n * p.out_bytes);
  double cycles = kLaunchCycles +
                  std::max(main + (shared ? share : turns) * around, bytes / kDeviceBytesPerCycle);
  if (splits > 1) {
    const double slab_bytes = static_cast<double>(p.m * p.n) * 4.0 * splits;
    cycles += kSplitCycles + 2.0 * slab_bytes / kDeviceBytesPerCycle;
  }
  return cycles;
}

// A tile with far more rows than the problem reads the same few rows of a from every block.
bool suits_rows(const GemmTile& tile, int64_t m) {
  return tile.block_m <= 16 || tile.block_m < 2 * m;
}

}  // namespace

int64_t k_blocks_per_split(const GemmTile& tile, int64_t k, int32_t splits) {
  return ceil_div(ceil_div(k, tile.block_k()), splits);
}

bool has_empty_split(const GemmTile& tile, int64_t k, int32_t splits) {
  return (splits - 1) * k_blocks_per_split(tile, k, splits) >= ceil_div(k, tile.block_k());
}

int64_t gemm_workspace_bytes(const GemmProblem& problem, const GemmPlan& plan) {
  return plan.splits == 1 ? 0 : problem.m * problem.n * 4 * plan.splits;
}

std::vector<GemmPlan> rank_gemm_plans(const GemmProblem& problem, const DeviceFacts& device) {
  std::vector<GemmPlan> plans;
  for (int32_t t = 0; t < static_cast<int32_t>(kNumGemmTiles); ++t) {
    const GemmTile& tile = kGemmTiles[t];
    if (tile.shared_bytes(tile.stages) > device.shared_bytes_per_block) continue;
    if (!problem.aligned && !tile.serves_unaligned()) continue;
    if (!suits_rows(tile, problem.m)) continue;
    for (const int32_t splits : kSplitCandidates) {
      if (has_empty_split(tile, problem.k, splits)) break;
      plans.push_back({t, splits, plan_cost(problem, device, tile, splits)});
    }
  }
  if (plans.empty()) {
    throw std::runtime_error("int8_ops: no GEMM tile fits the " +
                             std::to_string(device.shared_bytes_per_block) +
                             " bytes of shared memory a block may have on this device");
  }
  std::stable_sort(plans.begin(), plans.end(),
                   [](const GemmPlan& a, const GemmPlan& b) { return a.cost < b.cost; });
  return plans;
}

GemmPlan select_gemm_plan(const GemmProblem& problem, const DeviceFacts& device) {
  return rank_gemm_plans(problem, device).front();
}

std::string describe(const GemmPlan& plan) {
  const GemmTile& tile = plan.geometry();
  std::ostringstream out;
  out << tile.block_m << 'x' << tile.block_n << 'x' << tile.block_k() << " warps " << tile.warps_m
      << 'x' << tile.warps_n << 'x' << tile.warps_k << " stages " << tile.stages << " split "
      << plan.splits;
  return out.str();
}

}  // namespace int8_ops::cuda
