#include "gemm_heuristics.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <sstream>
#include <stdexcept>

#include "panel_tiles.h"
#include "skinny_cost.h"

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
constexpr double kDeviceBytesPerCycle = 1640;
constexpr double kFitted = 0.88;  // of an H100 to what was fitted on an H200

double sm80_cost(const GemmProblem& p, const DeviceFacts& device, const GemmTile& tile,
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
  return cycles * kFitted;
}

// Note [Cost of the Hopper kernels]
// Fitted to measurements on an H100 (M from 64 to 32768, K from 128 to 14336, N from 1024 to
// 14336): within 15 % of nearly all of them. Cycles of the busiest multiprocessor, never less than
// the bytes take.
//   - streaming: K-blocks and an epilogue a tile. The products of the widest tile have one set of
//   sums, so its epilogue adds to them; those of the others overlap with it in part.
//   - resident: a row tile's beginning (with x: loading and quantizing it), then a tile of columns
//   after the other, each as long as its products or its epilogue take.
//   - stationary: a tile of rows after the other, each as long as its products with the block's
//   columns or the quantization of a block's share take; the bytes hide behind that in part.
//   - panel: a launch and one chain of steps, longer with more rows a block; the bytes of the
//   device and those that cross from L2 hide behind that in part. More blocks than run at once
//   wait.
//   - x quantized beside the products: as fast as the helping warps are, and a late start.
//   - x quantized in a pass before: a launch of which little hides, and its bytes.
constexpr double kSm90LaunchCycles = 3600;
constexpr double kWrittenBytesPerCycle = 1450;  // less than of bytes read

double device_cycles(double read_bytes, const GemmProblem& p) {
  return read_bytes / kDeviceBytesPerCycle +
         static_cast<double>(p.m * p.n * p.out_bytes) / kWrittenBytesPerCycle;
}

struct StreamCost {
  double k_block;
  double tile;
  double start;
};
constexpr StreamCost kStreamCosts[] = {{1125, 4215, 2265}, {676, 1998, 2223}, {507, 700, 3000}};
static_assert(sizeof(kStreamCosts) / sizeof(kStreamCosts[0]) == kNumStreamTiles,
              "every streaming tile has its measured cost");

double stream_cost(const GemmProblem& p, const DeviceFacts& device, int32_t tile_index) {
  const StreamTile& tile = kStreamTiles[tile_index];
  const StreamCost& cost = kStreamCosts[tile_index];
  const int64_t works = ceil_div(p.m, StreamTile::kBlockM * tile.cluster_m) *
                        ceil_div(p.n, tile.block_n * tile.cluster_n);
  const int64_t clusters = device.sm_count / (tile.cluster_m * tile.cluster_n);
  const auto turns = static_cast<double>(ceil_div(works, std::max<int64_t>(1, clusters)));
  const auto k_blocks = static_cast<double>(ceil_div(p.k, StreamTile::kBlockK));
  const double products = kSm90LaunchCycles + cost.start +
                          std::max(turns * (k_blocks * cost.k_block + cost.tile),
                                   device_cycles(static_cast<double>((p.m + p.n) * p.k), p));
  if (p.x_bytes == 0) return products;
  // Rows that fit the helping warps' registers are read once, others twice, and the first come
  // late.
  const bool held = p.k <= 1024;
  const double late = held ? 14900 : 14900 + 6.0 * static_cast<double>(p.k);
  const double values = static_cast<double>(p.m * p.k) / device.sm_count;
  return late + std::max(products, kSm90LaunchCycles + values * (held ? 0.75 : 1.62));
}

double resident_cost(const GemmProblem& p, const DeviceFacts& device, const ResidentTile& tile,
                     int32_t parts) {
  constexpr double kStepCycles = 1840;     // a tile of columns, at least
  constexpr double kFirstCycles = 750;     // or this and
  constexpr double kKBlockCycles = 735;    // so many a K-block,
  constexpr double kStarvedCycles = 1150;  // or so many where few stages are left
  constexpr int32_t kFewStages = 6;
  const int64_t works = ceil_div(p.m, ResidentTile::kBlockM) * parts;
  const auto turns = static_cast<double>(ceil_div(works, device.sm_count));
  const auto n_tiles = static_cast<double>(ceil_div(ceil_div(p.n, tile.block_n), parts));
  const auto k_blocks = static_cast<double>(ceil_div(p.k, ResidentTile::kBlockK));
  const auto k = static_cast<double>(p.k);
  const double rows = p.x_bytes > 0 ? 11000 + 14.7 * k : 4200 + 0.73 * k;
  const double read = static_cast<double>(p.m * p.k * std::max<int64_t>(p.x_bytes, 1) + p.n * p.k);
  const bool starved = tile.shared(p.k, 1, device.shared_bytes_per_block).stages < kFewStages;
  const double k_block = starved ? kStarvedCycles : kKBlockCycles;
  const double step = std::max(kStepCycles, kFirstCycles + k_block * k_blocks);
  return kSm90LaunchCycles + std::max(turns * (rows + n_tiles * step), device_cycles(read, p));
}

// At once. Clusters of four leave some multiprocessors idle.
int64_t stationary_clusters(const StationaryTile& tile, const DeviceFacts& device) {
  return (device.sm_count - (tile.cluster > 2 ? 4 : 0)) / tile.cluster;
}

double stationary_cost(const GemmProblem& p, const DeviceFacts& device,
                       const StationaryTile& tile) {
  constexpr double kStartCycles = 670;
  constexpr double kClusterCycles = 260;  // meeting, a block
  // w of a block, per 128 columns and K-block: to registers, and all blocks' at once out of L2.
  constexpr double kTakeCycles = 290;
  constexpr double kWeightsBytesPerCycle = 5800;
  // A product of 64 rows and 128 columns.
  constexpr double kUnitCycles = 350;
  constexpr double kKBlockCycles = 224;
  constexpr double kBesideQuantizing = 1.23;
  constexpr double kWaitingForBlocks = 1.13;  // clusters of more than two, with few rows ahead
  constexpr double kShareCycles = 1500;       // of a block, of a tile of rows
  constexpr double kValueCycles = 0.205;
  constexpr double kThroughL2Cycles = 3450;
  constexpr double kReread = 1.03;
  constexpr double kUnscattered = 0.68;  // x is read in order
  constexpr double kNotHidden = 0.38;    // of what takes less time than the other
  const bool quantizes = p.x_bytes > 0;
  const int64_t clusters = stationary_clusters(tile, device);
  const int64_t parts = tile.parts(p.n, p.k);
  const int64_t m_tiles = ceil_div(p.m, StationaryTile::kBlockM);
  const int64_t clusters_a_part = std::max<int64_t>(1, clusters / parts);
  const auto turns = static_cast<double>(ceil_div(m_tiles, clusters_a_part));
  const int32_t k_blocks = StationaryTile::k_blocks(p.k);
  const auto units = static_cast<double>(tile.units(p.n, p.k));
  // What is compiled for more K-blocks than there are multiplies them all.
  double multiplying = units * (kUnitCycles + kKBlockCycles * StationaryTile::held_k_blocks(p.k));
  if (quantizes) multiplying *= kBesideQuantizing;
  double quantizing = 0.0;
  if (quantizes) {
    const double values = static_cast<double>(StationaryTile::kBlockM * p.k) / tile.cluster;
    quantizing = StationaryTile::through_l2(k_blocks) ? kThroughL2Cycles
                                                      : kShareCycles + kValueCycles * values;
  }
  double read = static_cast<double>(p.m * p.k * std::max<int64_t>(p.x_bytes, 1) + p.n * p.k);
  // Every part reads x.
  read += kReread * static_cast<double>((parts - 1) * p.m * p.k * p.x_bytes);
  const int64_t blocks = std::min(clusters_a_part, m_tiles) * parts * tile.cluster;
  const double weights = units * k_blocks;
  const double working = turns * std::max(multiplying, quantizing);
  const double moving = kUnscattered * device_cycles(read, p);
  const double waiting = !quantizes && tile.cluster > 2 ? kWaitingForBlocks : 1.0;
  return kSm90LaunchCycles + kStartCycles + kClusterCycles * tile.cluster + kTakeCycles * weights +
         static_cast<double>(blocks) * weights *
             (StationaryTile::kUnitColumns * StationaryTile::kBlockK) / kWeightsBytesPerCycle +
         waiting * (std::max(working, moving) + kNotHidden * std::min(working, moving));
}

// A launch and a chain of steps of one block.
constexpr double kPanelStartCycles[] = {3400, 3470, 3380, 4250};
static_assert(sizeof(kPanelStartCycles) / sizeof(kPanelStartCycles[0]) == kNumPanelTiles,
              "every panel tile has its measured cost");

double panel_cost(const GemmProblem& p, const DeviceFacts& device, int32_t tile_index) {
  constexpr double kRowCycles = 18;  // to quantize a row of a block
  constexpr double kTurnCycles = 2900;
  // Of the cycles that bytes take, what does not hide; written ones go out at the end.
  constexpr double kReadShare = 0.81;
  constexpr double kWrittenShare = 1.64;
  constexpr double kL2Share = 0.37;
  constexpr double kL2BytesPerCycle = 3200;  // to all multiprocessors
  constexpr double kBytesPerCycle = 45;      // into one
  const PanelTile& tile = kPanelTiles[tile_index];
  const int64_t row_blocks = ceil_div(p.m, tile.cluster_rows()) * tile.cluster;
  const int64_t strips = ceil_div(p.n, tile.cols);
  const int64_t blocks = row_blocks * strips;
  const auto share = static_cast<double>(ceil_div(blocks, device.sm_count));
  const auto turns =
      static_cast<double>(ceil_div(blocks, int64_t{device.sm_count} * PanelTile::kBlocksPerSm));
  const auto k = static_cast<double>(p.k);
  const auto x_bytes = static_cast<double>(std::max<int64_t>(p.x_bytes, 1));
  const double x = static_cast<double>(p.m) * k * x_bytes;
  const double w_block = tile.cols * k;  // L2 sends it once a cluster
  const double from_l2 =
      x * static_cast<double>(strips) + static_cast<double>(blocks) * w_block / tile.cluster;
  const double block_rows = static_cast<double>(std::min<int64_t>(p.m, tile.rows));
  const double into_one = share * (block_rows * k * x_bytes + w_block);
  const double read = x + static_cast<double>(p.n * p.k);
  const double written = static_cast<double>(p.m * p.n * p.out_bytes);
  return kPanelStartCycles[tile_index] + (p.x_bytes > 0 ? kRowCycles * tile.rows : 0.0) +
         kTurnCycles * (turns - 1) +
         (kReadShare * read + kWrittenShare * written) / kDeviceBytesPerCycle +
         kL2Share * std::max(from_l2 / kL2BytesPerCycle, into_one / kBytesPerCycle);
}

// A quantization in a pass before a matmul.
double quantize_cost(const GemmProblem& p, GemmPath path) {
  if (p.x_bytes == 0) return 0.0;
  // The Hopper kernels begin only where a multiprocessor is all theirs.
  const double launch = path == GemmPath::kStream       ? 6000
                        : path == GemmPath::kStationary ? 5200
                                                        : 4600;
  return launch + static_cast<double>(p.m * p.k * (p.x_bytes + 1)) / kDeviceBytesPerCycle;
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

bool is_useful_split(const GemmPlan& plan, const GemmProblem& problem) {
  switch (plan.path) {
    case GemmPath::kSm80:
      return !has_empty_split(plan.geometry(), problem.k, plan.splits);
    case GemmPath::kResident:
      return plan.splits <= ceil_div(problem.n, kResidentTiles[plan.tile].block_n);
    case GemmPath::kSkinny:
    case GemmPath::kStream:
    case GemmPath::kStationary:
    case GemmPath::kPanel:
      return plan.splits == 1;
  }
  return true;
}

int64_t gemm_workspace_bytes(const GemmProblem& problem, const GemmPlan& plan) {
  const bool slabs = plan.path == GemmPath::kSm80 && plan.splits > 1;
  return slabs ? problem.m * problem.n * 4 * plan.splits : 0;
}

int32_t num_tiles(GemmPath path) {
  switch (path) {
    case GemmPath::kSm80:
      return static_cast<int32_t>(kNumGemmTiles);
    case GemmPath::kSkinny:
      return static_cast<int32_t>(kNumSkinnyTiles);
    case GemmPath::kResident:
      return static_cast<int32_t>(kNumResidentTiles);
    case GemmPath::kStream:
      return static_cast<int32_t>(kNumStreamTiles);
    case GemmPath::kStationary:
      return static_cast<int32_t>(kNumStationaryTiles);
    case GemmPath::kPanel:
      return static_cast<int32_t>(kNumPanelTiles);
  }
  return 0;
}

std::string why_not_served(GemmPath path, int32_t tile, const GemmProblem& problem,
                           const DeviceFacts& device) {
  if (path == GemmPath::kSm80) {
    if (!problem.aligned && !kGemmTiles[tile].serves_unaligned()) {
      return "it takes no rows that start unaligned";
    }
    const int32_t needed = kGemmTiles[tile].shared_bytes(kGemmTiles[tile].stages);
    if (needed > device.shared_bytes_per_block) return "it needs more shared memory";
    return "";
  }
  if (path == GemmPath::kSkinny) {
    if (!problem.aligned) return "it takes no rows that start unaligned";
    if (problem.m > kMaxSkinnyRows) return "it takes M up to " + std::to_string(kMaxSkinnyRows);
    if (!skinny_fits(kSkinnyTiles[tile], problem.m, problem.k, device)) {
      return "it needs more shared memory";
    }
    return "";
  }
  if (!device.sm90) return "it needs a device of capability 9.0 and a build for 9.0a";
  if (!problem.aligned) return "it takes no rows that start unaligned";
  if (path == GemmPath::kPanel) {
    if (problem.m > kMaxPanelRows) return "it takes M up to " + std::to_string(kMaxPanelRows);
    if (problem.k > PanelTile::kMaxK) {
      return "it takes K up to " + std::to_string(PanelTile::kMaxK);
    }
    return "";
  }
  if (!problem.wide) return "it takes N in multiples of 8, and 16-byte aligned tensors";
  if (path == GemmPath::kResident) {
    if (problem.k > kMaxResidentK) return "it takes K up to " + std::to_string(kMaxResidentK);
    if (kResidentTiles[tile].shared(problem.k, 1, device.shared_bytes_per_block).stages == 0) {
      return "it needs more shared memory";
    }
  } else if (path == GemmPath::kStationary) {
    const StationaryTile& blocks = kStationaryTiles[tile];
    if (problem.k > StationaryTile::kMaxK) {
      return "it takes K up to " + std::to_string(StationaryTile::kMaxK);
    }
    if (problem.x_bytes > 2) return "it quantizes rows of 16-bit values alone";
    // Rows of the next tile are named before it is known whether there is one.
    if (problem.m > int64_t{1} << 30) return "it takes M up to 2^30";
    if (problem.x_bytes > 0 && !blocks.can_quantize(problem.k)) {
      return "its clusters of " + std::to_string(blocks.cluster) + " quantize K up to " +
             std::to_string(blocks.max_quantized_k());
    }
    if (blocks.parts(problem.n, problem.k) > stationary_clusters(blocks, device)) {
      return "it needs room for all of w at once";
    }
    if (blocks.shared(problem.n, problem.k, device.shared_bytes_per_block).stages == 0) {
      return "it needs more shared memory";
    }
  } else if (kStreamTiles[tile].shared(problem.k, device.shared_bytes_per_block).stages == 0) {
    return "it needs more shared memory";
  }
  return "";
}

std::vector<GemmPlan> rank_gemm_plans(const GemmProblem& problem, const DeviceFacts& device) {
  std::vector<GemmPlan> plans;
  const bool quantizes = problem.x_bytes > 0;
  GemmProblem given = problem;  // what a plan with a pass before it sees
  given.x_bytes = 0;
  const auto add = [&](GemmPath path, int32_t tile, int32_t splits, bool pass, double cost) {
    plans.push_back({path, tile, splits, pass, cost + (pass ? quantize_cost(problem, path) : 0.0)});
  };
  for (int32_t t = 0; t < num_tiles(GemmPath::kSm80); ++t) {
    const GemmTile& tile = kGemmTiles[t];
    if (!why_not_served(GemmPath::kSm80, t, problem, device).empty()) continue;
    if (!suits_rows(tile, problem.m)) continue;
    for (const int32_t splits : kSplitCandidates) {
      if (has_empty_split(tile, problem.k, splits)) break;
      add(GemmPath::kSm80, t, splits, quantizes, sm80_cost(given, device, tile, splits));
    }
  }
  for (int32_t t = 0; t < num_tiles(GemmPath::kSkinny); ++t) {
    if (!why_not_served(GemmPath::kSkinny, t, problem, device).empty()) continue;
    const auto cost = [&](const GemmProblem& p) {
      return skinny_cost({p.m, p.n, p.k, p.out_bytes, p.x_bytes}, device, kSkinnyTiles[t]);
    };
    add(GemmPath::kSkinny, t, 1, false, cost(problem));
    if (quantizes) add(GemmPath::kSkinny, t, 1, true, cost(given));
  }
  for (int32_t t = 0; t < num_tiles(GemmPath::kResident); ++t) {
    const ResidentTile& tile = kResidentTiles[t];
    if (!why_not_served(GemmPath::kResident, t, problem, device).empty()) continue;
    for (const int32_t parts : kSplitCandidates) {
      if (parts > ceil_div(problem.n, tile.block_n)) break;
      add(GemmPath::kResident, t, parts, false, resident_cost(problem, device, tile, parts));
    }
  }
  for (int32_t t = 0; t < num_tiles(GemmPath::kStream); ++t) {
    if (!why_not_served(GemmPath::kStream, t, problem, device).empty()) continue;
    // The helping warps count rows, and rows beyond theirs, in 32 bits.
    if (!quantizes || problem.m <= (int64_t{1} << 30)) {
      add(GemmPath::kStream, t, 1, false, stream_cost(problem, device, t));
    }
    if (quantizes) add(GemmPath::kStream, t, 1, true, stream_cost(given, device, t));
  }
  for (int32_t t = 0; t < num_tiles(GemmPath::kStationary); ++t) {
    const StationaryTile& tile = kStationaryTiles[t];
    if (why_not_served(GemmPath::kStationary, t, problem, device).empty()) {
      add(GemmPath::kStationary, t, 1, false, stationary_cost(problem, device, tile));
    }
    if (quantizes && why_not_served(GemmPath::kStationary, t, given, device).empty()) {
      add(GemmPath::kStationary, t, 1, true, stationary_cost(given, device, tile));
    }
  }
  for (int32_t t = 0; t < num_tiles(GemmPath::kPanel); ++t) {
    if (!why_not_served(GemmPath::kPanel, t, problem, device).empty()) continue;
    add(GemmPath::kPanel, t, 1, false, panel_cost(problem, device, t));
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
  std::ostringstream out;
  out << kGemmPathNames[static_cast<int32_t>(plan.path)] << ' ';
  if (plan.path == GemmPath::kSm80) {
    const GemmTile& tile = plan.geometry();
    out << tile.block_m << 'x' << tile.block_n << 'x' << tile.block_k() << " warps " << tile.warps_m
        << 'x' << tile.warps_n << 'x' << tile.warps_k << " stages " << tile.stages << " split "
        << plan.splits;
  } else if (plan.path == GemmPath::kSkinny) {
    const SkinnyTile& tile = kSkinnyTiles[plan.tile];
    out << tile.rows << 'x' << tile.cols() << " warps " << tile.warps_n << 'x' << tile.warps_k
        << " steps " << tile.steps;
  } else if (plan.path == GemmPath::kResident) {
    const ResidentTile& tile = kResidentTiles[plan.tile];
    out << ResidentTile::kBlockM << 'x' << tile.block_n << " staged " << tile.staged_cols
        << " parts " << plan.splits;
  } else if (plan.path == GemmPath::kStationary) {
    const StationaryTile& tile = kStationaryTiles[plan.tile];
    out << "cluster " << tile.cluster;
  } else if (plan.path == GemmPath::kPanel) {
    const PanelTile& tile = kPanelTiles[plan.tile];
    out << tile.rows << 'x' << tile.cols << " cluster " << tile.cluster;
  } else {
    const StreamTile& tile = kStreamTiles[plan.tile];
    out << StreamTile::kBlockM << 'x' << tile.block_n << 'x' << StreamTile::kBlockK << " cluster "
        << tile.cluster_m << 'x' << tile.cluster_n;
  }
  if (plan.pass) out << " after quantize";
  return out.str();
}

}  // namespace int8_ops::cuda
