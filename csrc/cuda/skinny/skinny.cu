// Picks the instantiation of a tile and of x's dtype, and the grid. All are compiled here: it takes
// seconds.
#include <algorithm>
#include <array>
#include <iterator>
#include <utility>

#include "skinny.cuh"
#include "skinny.h"

namespace int8_ops::cuda::skinny {
namespace {

using Launcher = void (*)(const SkinnyArgs&, bool, DType, const LaunchShape&, const ExecContext&);

template <int... kIndex>
constexpr std::array<Launcher, sizeof...(kIndex)> make_launchers(
    std::integer_sequence<int, kIndex...>) {
  return {launch_tile<kIndex>...};
}
constexpr auto kLaunchers =
    make_launchers(std::make_integer_sequence<int, static_cast<int>(kNumSkinnyTiles)>{});

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void matmul(const MatmulParams& p, int32_t tile_index, const DeviceFacts& device) {
  const SkinnyTile& tile = kSkinnyTiles[tile_index];
  const SkinnyGrid grid = skinny_grid(tile, p.m, p.n, p.k, device);
  SkinnyArgs args;
  args.x = p.x != nullptr ? p.x : p.a;
  args.w = p.w;
  args.k = static_cast<int32_t>(p.k);
  args.col_tiles = static_cast<int32_t>(ceil_div(checked_int32(p.n, "columns"), tile.cols()));
  args.k_blocks_per_warp = tile.k_blocks_per_warp(p.k);
  args.row_stride = SkinnyTile::row_stride(p.k);
  args.units = static_cast<int32_t>(ceil_div(p.k, kUnit));
  args.units_inverse = inverse_of(args.units);
  args.epilogue = {
      p.a_scale,
      p.w_scale,
      p.bias,
      p.bias_dtype,
      p.out,
      p.out_dtype,
      static_cast<int32_t>(p.m),
      static_cast<int32_t>(p.n),
      p.n % 8 == 0 && is_aligned(p.out, 16) && is_aligned(p.w_scale, 16) && is_aligned(p.bias, 16)};
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(grid.cols), static_cast<unsigned>(grid.rows));
  shape.block = dim3(static_cast<unsigned>(tile.threads()));
  shape.shared_bytes = static_cast<size_t>(tile.shared_bytes(p.m, p.k));
  kLaunchers[static_cast<size_t>(tile_index)](args, p.x != nullptr, p.x_dtype, shape, p.ctx);
}

}  // namespace int8_ops::cuda::skinny
