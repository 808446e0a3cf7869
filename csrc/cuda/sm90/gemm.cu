// From a plan to a launch: tensor maps, stages, grid.
#include <algorithm>
#include <array>
#include <bit>
#include <utility>

#include "../../common/quantized_rows.h"
#include "../ptx/grid_dependency.cuh"
#include "gemm.h"
#include "launchers.cuh"
#include "tensor_map.h"

namespace int8_ops::cuda::sm90 {
namespace {

constexpr int32_t ceil_div(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

template <int... kTile>
constexpr std::array<ResidentLauncher, 4 * sizeof...(kTile)> resident_launchers(
    std::integer_sequence<int, kTile...>) {
  return {launch_resident<kTile, Source::kInt8>..., launch_resident<kTile, Source::kFloat16>...,
          launch_resident<kTile, Source::kBFloat16>...,
          launch_resident<kTile, Source::kFloat32>...};
}
template <int... kTile>
constexpr std::array<StreamLauncher, 4 * sizeof...(kTile)> stream_launchers(
    std::integer_sequence<int, kTile...>) {
  return {launch_stream<kTile, Source::kInt8>..., launch_stream<kTile, Source::kFloat16>...,
          launch_stream<kTile, Source::kBFloat16>..., launch_stream<kTile, Source::kFloat32>...};
}
// K-blocks: 1, 2, 4, and so on.
constexpr size_t kStationaryKs = std::bit_width(static_cast<unsigned>(StationaryTile::kMaxKBlocks));
template <int... kLog>
constexpr std::array<StationaryLauncher, 3 * sizeof...(kLog)> stationary_launchers(
    std::integer_sequence<int, kLog...>) {
  return {launch_stationary<(1 << kLog), Source::kInt8>...,
          launch_stationary<(1 << kLog), Source::kFloat16>...,
          launch_stationary<(1 << kLog), Source::kBFloat16>...};
}
constexpr auto kStationaryLaunchers =
    stationary_launchers(std::make_integer_sequence<int, static_cast<int>(kStationaryKs)>{});
constexpr auto kResidentLaunchers =
    resident_launchers(std::make_integer_sequence<int, static_cast<int>(kNumResidentTiles)>{});
constexpr auto kStreamLaunchers =
    stream_launchers(std::make_integer_sequence<int, static_cast<int>(kNumStreamTiles)>{});

constexpr int kClearThreads = 256;

// Before the kernel whose blocks count in them. The scales are read four at a time: those beyond
// the last row are set too.
__global__ void __launch_bounds__(kClearThreads)
    clear_counters_kernel(uint32_t* counters, int64_t count, float* beyond_scales, int32_t beyond) {
  ptx::grid_dependency_wait();
  for (int64_t i = threadIdx.x; i < count; i += kClearThreads) counters[i] = 0;
  if (threadIdx.x < beyond) beyond_scales[threadIdx.x] = 0.0F;
}

// Rounds drawn, and one for every so many rows.
int64_t counters_of(const MatmulParams& p) { return 1 + ceil_div(p.m, kSm90CountedRows); }

Source source_of(const MatmulParams& p) {
  if (p.x == nullptr) return Source::kInt8;
  switch (p.x_dtype) {
    case DType::kFloat16:
      return Source::kFloat16;
    case DType::kBFloat16:
      return Source::kBFloat16;
    default:
      return Source::kFloat32;
  }
}

// out_rows: of the boxes that leave at once.
GemmArgs common_args(const MatmulParams& p, int32_t out_rows) {
  GemmArgs args{};
  args.x = p.x;
  args.m = checked_int32(p.m, "rows");
  args.n = checked_int32(p.n, "columns");
  args.k = static_cast<int32_t>(p.k);
  args.k_blocks = ceil_div(p.k, ResidentTile::kBlockK);
  if (size_of(p.out_dtype) == 2) {
    args.out_map = make_tensor_map(p.out, p.m, p.n, 2, out_rows);
  }
  args.epilogue = {p.a_scale,   p.w_scale, p.bias, p.bias_dtype, p.out,
                   p.out_dtype, args.m,    args.n, true};
  return args;
}

}  // namespace

bool has_code() {
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, clear_counters_kernel), "sm90 counters");
  return attributes.ptxVersion >= 90;
}

void resident(const MatmulParams& p, int32_t tile_index, int32_t parts, const DeviceFacts& device) {
  const ResidentTile& tile = kResidentTiles[tile_index];
  const Source source = source_of(p);
  GemmArgs args = common_args(p, 64);
  args.w_map = make_tensor_map(p.w, p.n, p.k, 1, tile.block_n);
  if (source == Source::kInt8)
    args.a_map = make_tensor_map(p.a, p.m, p.k, 1, ResidentTile::kBlockM);
  args.m_tiles = ceil_div(p.m, ResidentTile::kBlockM);
  args.n_tiles = ceil_div(p.n, tile.block_n);
  args.n_parts = parts;
  // The copy engine can fetch the next rows while these are in use.
  const int32_t limit = device.shared_bytes_per_block;
  const bool two = source == Source::kInt8 && tile.shared(p.k, 2, limit).stages >= kWantedStages;
  const int32_t buffers = two ? 2 : 1;
  const Sm90Shared shared = tile.shared(p.k, buffers, limit);
  args.stages = shared.stages;
  args.factor_slots = shared.factor_slots;

  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(std::min(args.m_tiles * parts, device.sm_count)));
  shape.block = dim3(ResidentTile::kThreads);
  shape.shared_bytes = static_cast<size_t>(shared.bytes);
  const size_t launcher = static_cast<size_t>(source) * kNumResidentTiles + tile_index;
  kResidentLaunchers.at(launcher)(args, static_cast<uint32_t>(buffers), shape, p.ctx);
}

int64_t stationary_workspace_bytes(const MatmulParams& p, int32_t tile_index,
                                   const DeviceFacts& device) {
  const int32_t k_blocks = StationaryTile::k_blocks(p.k);
  if (p.x == nullptr || !StationaryTile::through_l2(k_blocks)) return 0;
  const StationaryTile& tile = kStationaryTiles[tile_index];
  const int32_t buffers = tile.shared(p.n, p.k, device.shared_bytes_per_block).stages;
  const int64_t share = StationaryTile::share_bytes(k_blocks);
  return align_workspace(device.sm_count * buffers * share);
}

void stationary(const MatmulParams& p, int32_t tile_index, const DeviceFacts& device) {
  const StationaryTile& tile = kStationaryTiles[tile_index];
  const Source source = source_of(p);
  GemmArgs args = common_args(p, StationaryTile::kBlockM);
  args.q = static_cast<int8_t*>(p.workspace);
  args.w_map = make_tensor_map(p.w, p.n, p.k, 1, StationaryTile::kUnitColumns / 2);
  if (source == Source::kInt8) {
    const int32_t pieces = StationaryTile::pieces(tile.cluster, args.k_blocks);
    args.a_map = make_tensor_map(p.a, p.m, p.k, 1, StationaryTile::kBlockM / pieces);
  }
  args.m_tiles = ceil_div(p.m, StationaryTile::kBlockM);
  args.n_parts = static_cast<int32_t>(tile.parts(p.n, p.k));
  args.n_tiles = tile.units(p.n, p.k);
  const Sm90Shared shared = tile.shared(p.n, p.k, device.shared_bytes_per_block);
  args.stages = shared.stages;

  LaunchShape shape;
  shape.block = dim3(StationaryTile::kThreads);
  shape.cluster = static_cast<unsigned>(tile.cluster);
  shape.shared_bytes = static_cast<size_t>(shared.bytes);
  // One for every power of two K-blocks.
  const auto held = static_cast<unsigned>(StationaryTile::held_k_blocks(p.k));
  const size_t launcher = static_cast<size_t>(source) * kStationaryKs + std::countr_zero(held);
  kStationaryLaunchers.at(launcher)(args, shape, args.m_tiles * args.n_parts, p.ctx);
}

int64_t stream_workspace_bytes(const MatmulParams& p) {
  return quantized_rows_bytes(p) + align_workspace(counters_of(p) * 4);
}

void stream(MatmulParams& p, int32_t tile_index, const DeviceFacts& device) {
  const StreamTile& tile = kStreamTiles[tile_index];
  const Source source = source_of(p);
  QuantizeParams quantize;
  if (source != Source::kInt8) {
    quantize = place_quantized_rows(p);
    LaunchShape shape;
    shape.grid = dim3(1);
    shape.block = dim3(kClearThreads);
    launch<clear_counters_kernel>("sm90 counters", shape, p.ctx,
                                  static_cast<uint32_t*>(p.workspace), counters_of(p),
                                  quantize.scale + p.m, static_cast<int32_t>(-p.m & 3));
  }
  GemmArgs args = common_args(p, 64);
  args.x = quantize.x;
  args.q = quantize.q;
  args.row_scales = quantize.scale;
  args.drawn = static_cast<uint32_t*>(p.workspace);
  args.done = args.drawn + 1;
  args.w_map = make_tensor_map(p.w, p.n, p.k, 1, tile.block_n / tile.cluster_m);
  args.a_map = make_tensor_map(p.a, p.m, p.k, 1, StreamTile::kBlockM / tile.cluster_n);
  args.m_tiles = ceil_div(p.m, StreamTile::kBlockM * tile.cluster_m);
  args.n_tiles = ceil_div(p.n, tile.block_n * tile.cluster_n);
  const Sm90Shared shared = tile.shared(p.k, device.shared_bytes_per_block);
  args.stages = shared.stages;
  args.factor_slots = shared.factor_slots;

  LaunchShape shape;
  const int32_t cluster = tile.cluster_m * tile.cluster_n;
  const int32_t clusters = std::min(args.m_tiles * args.n_tiles, device.sm_count / cluster);
  shape.grid = dim3(static_cast<unsigned>(clusters * cluster));
  shape.block = dim3(StreamTile::kThreads);
  shape.cluster = static_cast<unsigned>(cluster);
  shape.shared_bytes = static_cast<size_t>(shared.bytes);
  const size_t launcher = static_cast<size_t>(source) * kNumStreamTiles + tile_index;
  kStreamLaunchers.at(launcher)(args, shape, p.ctx);
}

}  // namespace int8_ops::cuda::sm90
