#include "gemm_heuristics.h"

#include <algorithm>
#include <array>
#include <sstream>
#include <stdexcept>

namespace int8_ops::cuda {
namespace {

constexpr std::array<int32_t, 6> kSplitCandidates = {1, 2, 4, 8, 16, 32};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Note [Cost model]
// A plan's time in multiprocessor cycles, from rates that depend on the tile alone:
//   - int8 products: mma.sync on Hopper issues about 5200 operations a cycle and multiprocessor at
//     best; a small warp tile reloads its operands more often and stays further below.
//   - bytes from L2 into shared memory and of the output.
//   - a fixed price a block for its prologue and epilogue, hidden in part where several blocks
//   share
//     a multiprocessor, and a fixed price for the second kernel of a split.
// Only the order of the costs matters, and only near ties: the figures were set so that the choice
// is within a few percent of the best measured tile on the shapes of benchmarks/.
constexpr double kOpsPerCycle = 5200;
constexpr double kLoadBytesPerCycle = 48;
constexpr double kStoreBytesPerCycle = 20;
constexpr double kBlockOverheadCycles = 1600;
constexpr double kSplitOverheadCycles = 4000;
// All multiprocessors together: bytes from device memory a cycle.
constexpr double kDeviceBytesPerCycle = 2000;

double tile_efficiency(const GemmTile& tile) {
  const double warp_area = static_cast<double>(tile.warp_m()) * tile.warp_n();
  if (warp_area >= 64 * 64) return tile.block_n == 256 ? 0.95 : 0.9;
  if (warp_area >= 32 * 64) return 0.75;
  if (warp_area >= 32 * 32) return 0.55;
  return 0.3;
}

double plan_cost(const GemmProblem& p, const DeviceFacts& device, const GemmTile& tile,
                 int32_t splits) {
  const int64_t tiles = ceil_div(p.m, tile.block_m) * ceil_div(p.n, tile.block_n);
  const int64_t blocks = tiles * splits;
  const double k_per_block =
      static_cast<double>(k_blocks_per_split(tile, p.k, splits)) * tile.block_k();
  const double rows = static_cast<double>(std::min<int64_t>(p.m, tile.block_m));
  const double out_bytes = splits > 1 ? 4.0 : static_cast<double>(p.out_bytes);

  const double mma =
      2.0 * tile.block_m * tile.block_n * k_per_block / (kOpsPerCycle * tile_efficiency(tile));
  const double load = (rows + tile.block_n) * k_per_block / kLoadBytesPerCycle;
  const double store = rows * tile.block_n * out_bytes / kStoreBytesPerCycle;

  // Blocks beyond a multiprocessor's share queue up; those beside each other hide one another's
  // prologue and stores behind products.
  const int32_t resident = tile.blocks_per_sm;
  const int64_t waves = ceil_div(blocks, device.sm_count);
  const double overlap = std::min<double>(resident, static_cast<double>(waves));
  const double exposed = (kBlockOverheadCycles + store) / overlap;
  double cycles = static_cast<double>(waves) * (std::max(mma, load) + exposed);

  const double device_bytes =
      static_cast<double>(p.m * p.k + p.n * p.k) + static_cast<double>(p.m * p.n * p.out_bytes);
  cycles = std::max(cycles, device_bytes / kDeviceBytesPerCycle);
  if (splits > 1) {
    const double slab_bytes = static_cast<double>(p.m * p.n) * 4.0 * splits;
    cycles += kSplitOverheadCycles + 2.0 * slab_bytes / kDeviceBytesPerCycle;
  }
  return cycles;
}

}  // namespace

int64_t k_blocks_per_split(const GemmTile& tile, int64_t k, int32_t splits) {
  return ceil_div(ceil_div(k, tile.block_k()), splits);
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
    for (const int32_t splits : kSplitCandidates) {
      // No empty split: the last one must still have a K-block.
      if (splits > 1 && (splits - 1) * k_blocks_per_split(tile, problem.k, splits) >=
                            ceil_div(problem.k, tile.block_k())) {
        break;
      }
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
