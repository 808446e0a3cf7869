// Which tile and split a GEMM problem gets: candidates -> cost -> choice. Pure host code, no torch,
// no CUDA: tested on any machine through int8_ops._build.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gemm_tiles.h"
#include "sm90_tiles.h"

namespace int8_ops::cuda {

struct GemmProblem {
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t out_bytes;  // of one element of the output
  bool aligned;       // every row of w and of a, or x, starts 16-byte aligned
  bool wide;          // n is a multiple of 8, and out, scales and bias start 16-byte aligned
  int64_t x_bytes;    // of one element of x, which is to be quantized; 0 where a is given

  bool operator==(const GemmProblem&) const = default;
};

// What the choice needs to know of a device.
struct DeviceFacts {
  int32_t sm_count;
  int32_t shared_bytes_per_block;  // the opt-in limit
  bool sm90;                       // runs, and the library holds, the code of sm_90a
};

// Whose kernels a plan names.
enum class GemmPath : int32_t { kSm80, kSkinny, kResident, kStream, kStationary, kPanel };
inline constexpr const char* kGemmPathNames[] = {"sm80",   "skinny",     "resident",
                                                 "stream", "stationary", "panel"};
inline constexpr int32_t kNumGemmPaths = 6;

struct GemmPlan {
  GemmPath path;
  int32_t tile;    // index into the path's tiles: kGemmTiles, kSkinnyTiles, kResidentTiles,
                   // kStreamTiles, kStationaryTiles, kPanelTiles
  int32_t splits;  // sm80: along K, each with sums of its own; resident: parts of the columns
  bool pass;       // x is quantized in a pass before; else inside the kernel, or there is none
  double cost;     // predicted multiprocessor cycles, for comparison only

  const GemmTile& geometry() const { return kGemmTiles[tile]; }
};

// How many tiles a path has.
int32_t num_tiles(GemmPath path);

// Why a path can't take a problem on a device; empty where it can.
std::string why_not_served(GemmPath path, int32_t tile, const GemmProblem& problem,
                           const DeviceFacts& device);

// K-blocks that each split gets, and the splits that are then not empty.
int64_t k_blocks_per_split(const GemmTile& tile, int64_t k, int32_t splits);

// Whether the last of so many splits would have no K-block left.
bool has_empty_split(const GemmTile& tile, int64_t k, int32_t splits);

// Whether every one of a plan's splits, or parts, has something to do.
bool is_useful_split(const GemmPlan& plan, const GemmProblem& problem);

// int32 partial sums, one slab a split; 0 without a split.
int64_t gemm_workspace_bytes(const GemmProblem& problem, const GemmPlan& plan);

// Every plan the device can run, with its cost, cheapest first.
std::vector<GemmPlan> rank_gemm_plans(const GemmProblem& problem, const DeviceFacts& device);

// The cheapest plan.
GemmPlan select_gemm_plan(const GemmProblem& problem, const DeviceFacts& device);

// "sm80 128x256x128 warps 2x4x1 stages 3 split 1", as INT8_OPS_PRINT_CONFIG=1 prints it.
std::string describe(const GemmPlan& plan);

}  // namespace int8_ops::cuda
