#include "skinny_cost.h"

#include <algorithm>

namespace int8_ops::cuda {
namespace {

// Note [Cost of few rows]
// The weights stream through device memory, L2 and the multiprocessors, and the slowest of these
// sets the pace; so do too few bytes under way. While the first of them are on their way, the block
// quantizes its rows (or copies them): what takes longer than the ring of weights lasts comes on
// top. At the end, one tile's meeting of the K-warps and the stores. The constants were set so that
// the choice is the best measured one, or close to it, on an H100.
constexpr double kLaunchCycles = 3500;
constexpr double kLatencyCycles = 1000;  // of device memory under load
constexpr double kDeviceBytesPerCycle = 1700;
constexpr double kL2BytesPerCycle = 3200;   // to all multiprocessors
constexpr double kBytesPerCycle = 45;       // into one multiprocessor
constexpr double kFillBytesPerCycle = 24;   // the same when all of them fetch rows
constexpr double kQuantizeCycles = 0.2;     // a value
constexpr double kThreadValueCycles = 40;   // a value, one thread's way through it
constexpr double kBatchCycles = 900;        // of x: Note [Two passes over x] in row_loader.cuh
constexpr double kMeetCycles = 300;         // of all warps, for the amax of the rows
constexpr double kStepCycles = 45;          // copying and reading a K-block of 16 columns
constexpr double kProductCycles = 20;       // its products with 16 rows
constexpr double kTileCycles = 400;         // epilogue, one thread's way through it
constexpr double kWarpCycles = 2;           // starting a block and meeting, a warp
constexpr double kStoreBytesPerCycle = 18;  // as for the GEMM tiles
constexpr int32_t kReservedBytes = 1024;    // of shared memory, a block

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t resident_blocks(const SkinnyTile& tile, int64_t m, int64_t k, const DeviceFacts& device) {
  // A multiprocessor has what one block may have at most, and that block's reserve.
  const int64_t by_memory =
      (device.shared_bytes_per_block + kReservedBytes) / (tile.shared_bytes(m, k) + kReservedBytes);
  return std::max<int64_t>(1, std::min<int64_t>(tile.blocks_per_sm, by_memory));
}

}  // namespace

bool skinny_fits(const SkinnyTile& tile, int64_t m, int64_t k, const DeviceFacts& device) {
  return tile.shared_bytes(m, k) <= device.shared_bytes_per_block;
}

SkinnyGrid skinny_grid(const SkinnyTile& tile, int64_t m, int64_t n, int64_t k,
                       const DeviceFacts& device) {
  const int64_t rows = ceil_div(m, tile.rows);
  const int64_t at_once = resident_blocks(tile, m, k, device) * device.sm_count / rows;
  const int64_t cols = std::min(ceil_div(n, tile.cols()), std::max<int64_t>(1, at_once));
  return {static_cast<int32_t>(cols), static_cast<int32_t>(rows)};
}

double skinny_cost(const SkinnyProblem& p, const DeviceFacts& device, const SkinnyTile& tile) {
  const SkinnyGrid grid = skinny_grid(tile, p.m, p.n, p.k, device);
  const int64_t col_tiles = ceil_div(p.n, tile.cols());
  const auto blocks = static_cast<double>(grid.cols) * grid.rows;
  const auto share = static_cast<double>(  // tiles of the busiest multiprocessor
      ceil_div(col_tiles * grid.rows, device.sm_count));
  const auto blocks_per_sm =
      static_cast<double>(ceil_div(static_cast<int64_t>(grid.cols) * grid.rows, device.sm_count));
  const auto turns = static_cast<double>(ceil_div(col_tiles, grid.cols));

  const auto k = static_cast<double>(p.k);
  const double tile_rows = static_cast<double>(std::min<int64_t>(p.m, tile.rows));
  const double tile_bytes = tile.cols() * k;
  const double row_groups = static_cast<double>(ceil_div(tile.rows, 16));

  // Weights.
  const auto weights = static_cast<double>(p.n * p.k);
  const double x_bytes =
      static_cast<double>(p.m) * k * static_cast<double>(std::max<int64_t>(p.x_bytes, 1));
  const double out_bytes = static_cast<double>(p.m * p.n * p.out_bytes);
  const double under_way =
      blocks * std::min(static_cast<double>(tile.bytes_in_flight()), turns * tile_bytes);
  const double steps = share * tile_bytes / SkinnyTile::kStepBytes;
  const double stream =
      std::max({(weights + x_bytes + out_bytes) / kDeviceBytesPerCycle,
                weights * grid.rows / kL2BytesPerCycle, share * tile_bytes / kBytesPerCycle,
                steps * (kStepCycles + kProductCycles * row_groups),
                weights * grid.rows * kLatencyCycles / under_way});

  // Rows of x, each block its own.
  const double values = blocks_per_sm * tile_rows * k;
  double fill = values / kFillBytesPerCycle;
  if (p.x_bytes > 0) {
    constexpr int64_t kUnit = 512;
    const auto rows = static_cast<int64_t>(tile_rows);
    const int64_t in_batch = (p.x_bytes == 4 ? 4 : 8) * tile.warps();
    const auto batches = static_cast<double>(ceil_div(rows * ceil_div(p.k, kUnit), in_batch));
    const double a_thread = tile_rows * k / tile.threads();
    fill = kMeetCycles + a_thread * kThreadValueCycles +
           std::max(values * kQuantizeCycles, batches * kBatchCycles);
  }
  const double lasting = std::min(stream, under_way / kDeviceBytesPerCycle);

  const double stores =
      share * tile_rows * tile.cols() * static_cast<double>(p.out_bytes) / kStoreBytesPerCycle;
  const double tiles = (share - 1) * row_groups * (tile.rows > 8 ? 4.0 * kTileCycles : 0.0);
  return kLaunchCycles + kLatencyCycles + tiles + std::max(fill, lasting) + (stream - lasting) +
         kTileCycles + kWarpCycles * tile.warps() + stores;
}

}  // namespace int8_ops::cuda
