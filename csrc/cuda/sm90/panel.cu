// Picks the instantiation of a tile and of x's dtype, and the grid. All are compiled here: it takes
// seconds.
#include <array>
#include <utility>

#include "gemm.h"
#include "panel.cuh"

namespace int8_ops::cuda::sm90 {
namespace {

using Launcher = void (*)(const PanelArgs&, bool, DType, const LaunchShape&, const ExecContext&);

template <int... kIndex>
constexpr std::array<Launcher, sizeof...(kIndex)> make_launchers(
    std::integer_sequence<int, kIndex...>) {
  return {launch_panel<kIndex>...};
}
constexpr auto kLaunchers =
    make_launchers(std::make_integer_sequence<int, static_cast<int>(kNumPanelTiles)>{});

constexpr unsigned ceil_div(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

}  // namespace

void panel(const MatmulParams& p, int32_t tile_index) {
  const PanelTile& tile = kPanelTiles[tile_index];
  PanelArgs args;
  args.x = p.x != nullptr ? p.x : p.a;
  args.w = p.w;
  args.k = static_cast<int32_t>(p.k);
  args.epilogue = {
      p.a_scale,
      p.w_scale,
      p.bias,
      p.bias_dtype,
      p.out,
      p.out_dtype,
      static_cast<int32_t>(p.m),
      checked_int32(p.n, "columns"),
      p.n % 8 == 0 && is_aligned(p.out, 16) && is_aligned(p.w_scale, 16) && is_aligned(p.bias, 16)};
  LaunchShape shape;
  shape.cluster = static_cast<unsigned>(tile.cluster);
  shape.grid = dim3(ceil_div(p.n, tile.cols) * shape.cluster, ceil_div(p.m, tile.cluster_rows()));
  shape.block = dim3(PanelTile::kThreads);
  shape.shared_bytes = static_cast<size_t>(tile.shared_bytes());
  kLaunchers[static_cast<size_t>(tile_index)](args, p.x != nullptr, p.x_dtype, shape, p.ctx);
}

}  // namespace int8_ops::cuda::sm90
