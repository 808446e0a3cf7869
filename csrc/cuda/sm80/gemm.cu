// Picks the instantiation of a plan and, for a split plan, sums the slabs through the epilogue.
#include <array>
#include <utility>

#include "gemm.cuh"
#include "gemm.h"

namespace int8_ops::cuda::sm80 {

// Instantiated one a file in instantiations/; a tile with its line here but without its file
// is a link error.
#define INT8_OPS_EXTERN_TILE(i) \
  extern template void launch_gemm<i>(const GemmArgs&, bool, int32_t, const ExecContext&)
INT8_OPS_EXTERN_TILE(0);
INT8_OPS_EXTERN_TILE(1);
INT8_OPS_EXTERN_TILE(2);
INT8_OPS_EXTERN_TILE(3);
INT8_OPS_EXTERN_TILE(4);
INT8_OPS_EXTERN_TILE(5);
INT8_OPS_EXTERN_TILE(6);
#undef INT8_OPS_EXTERN_TILE

namespace {

using Launcher = void (*)(const GemmArgs&, bool, int32_t, const ExecContext&);

template <int... kIndex>
constexpr std::array<Launcher, sizeof...(kIndex)> make_launchers(
    std::integer_sequence<int, kIndex...>) {
  return {launch_gemm<kIndex>...};
}
constexpr auto kLaunchers =
    make_launchers(std::make_integer_sequence<int, static_cast<int>(kNumGemmTiles)>{});

constexpr int kReduceThreads = 128;

// Sums int32 slabs [splits, m, n] and applies the epilogue, eight columns a thread.
__global__ void __launch_bounds__(kReduceThreads)
    reduce_splits_kernel(const int32_t* slabs, int32_t splits, ScaleEpilogue epilogue) {
  ptx::grid_dependency_wait();
  const int32_t groups = (epilogue.n + 7) / 8;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (index >= static_cast<int64_t>(epilogue.m) * groups) return;
  const auto row = static_cast<int32_t>(index / groups);
  const auto col = static_cast<int32_t>(index % groups) * 8;
  const int64_t slab = static_cast<int64_t>(epilogue.m) * epilogue.n;
  const int32_t* from = slabs + static_cast<int64_t>(row) * epilogue.n + col;
  int32_t acc[8] = {};
  for (int32_t s = 0; s < splits; ++s, from += slab) {
    if (epilogue.vector) {
      const int4 lo = reinterpret_cast<const int4*>(from)[0];
      const int4 hi = reinterpret_cast<const int4*>(from)[1];
      const int32_t part[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
#pragma unroll
      for (int e = 0; e < 8; ++e) acc[e] += part[e];
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (col + e < epilogue.n) acc[e] += from[e];
      }
    }
  }
  epilogue.with_out_dtype([&]<DType kOut, bool kVector>() {
    float row_scale = 0.0F;
    ScaleEpilogue::Columns columns = {};
    if (kOut != DType::kInt32) {
      row_scale = __ldg(epilogue.a_scale + row);
      columns = epilogue.load_columns<kVector>(col);
    }
    epilogue.store_x8<kOut, kVector>(row, col, acc, row_scale, columns);
  });
}

constexpr int32_t ceil_div(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

// Whether cp.async can move every 16 bytes of every row of a and w.
bool has_aligned_rows(const MatmulParams& p) {
  return p.k % 16 == 0 && is_aligned(p.a, 16) && is_aligned(p.w, 16);
}

}  // namespace

void gemm(const MatmulParams& p, const GemmPlan& plan, int32_t sm_count) {
  const GemmTile& tile = plan.geometry();
  GemmArgs args;
  args.a = p.a;
  args.w = p.w;
  args.m = checked_int32(p.m, "rows");
  args.n = checked_int32(p.n, "columns");
  args.k = static_cast<int32_t>(p.k);
  args.m_tiles = ceil_div(p.m, tile.block_m);
  args.n_tiles = ceil_div(p.n, tile.block_n);
  args.splits = plan.splits;
  args.k_blocks_per_split = static_cast<int32_t>(k_blocks_per_split(tile, p.k, plan.splits));
  const bool aligned = has_aligned_rows(p);
  args.epilogue = {
      p.a_scale,
      p.w_scale,
      p.bias,
      p.bias_dtype,
      p.out,
      p.out_dtype,
      args.m,
      args.n,
      p.n % 8 == 0 && is_aligned(p.out, 16) && is_aligned(p.w_scale, 16) && is_aligned(p.bias, 16)};
  if (plan.splits == 1) {
    kLaunchers[static_cast<size_t>(plan.tile)](args, aligned, sm_count, p.ctx);
    return;
  }
  const ScaleEpilogue final_epilogue = args.epilogue;
  args.epilogue.out = p.workspace;
  args.epilogue.out_dtype = DType::kInt32;
  kLaunchers[static_cast<size_t>(plan.tile)](args, aligned, sm_count, p.ctx);

  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(ceil_div(p.m * ceil_div(p.n, 8), kReduceThreads)));
  shape.block = dim3(kReduceThreads);
  launch<reduce_splits_kernel>("split-K reduction", shape, p.ctx,
                               static_cast<const int32_t*>(p.workspace), plan.splits,
                               final_epilogue);
}

}  // namespace int8_ops::cuda::sm80
