// The matmul drivers, shared by the instruction sets: V is the vector-ops struct of one of them
// (simd_avx2.h, simd_avx512_vnni.h). Included by the units of those alone, and everything stands in
// an anonymous namespace: see Note [One unit an instruction set] in isa.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/numerics.h"
#include "kernels.h"
#include "simd_elementwise.h"
#include "simd_memory.h"

namespace int8_ops::cpu {
namespace {

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The epilogue of one vector of columns, [col, col + count), down some rows: sums[i * sum_stride]
// is the vector of row rows.begin + i. out = round((float(acc) * a_scale) * w_scale + bias).
template <typename V, DType kOut>
void scale_and_store(const MatmulParams& p, Range rows, int64_t col, int64_t count,
                     const int32_t* sums, int64_t sum_stride) {
  using Float = typename V::Float;
  const Float w_scale = load_floats<V, DType::kFloat32>(p.w_scale, col, count);
  const auto each_row = [&](auto finish) __attribute__((always_inline)) {
    for (int64_t row = rows.begin; row < rows.end; ++row, sums += sum_stride) {
      const Float acc = V::to_float(V::load_ints(sums));
      const Float y = V::mul(V::mul(acc, V::broadcast(p.a_scale[row])), w_scale);
      store_floats<V, kOut>(p.out, row * p.n + col, count, finish(y));
    }
  };
  if (p.bias == nullptr) {
    each_row([](Float y) __attribute__((always_inline)) { return y; });
    return;
  }
  Float bias = V::zero_float();
  with_float_dtype(p.bias_dtype, [&](auto dtype) {
    bias = load_floats<V, decltype(dtype)::value>(p.bias, col, count);
  });
  each_row([&](Float y) __attribute__((always_inline)) { return V::add(y, bias); });
}

// The same, or the sums themselves where out is int32.
template <typename V>
void store_columns(const MatmulParams& p, Range rows, int64_t col, int64_t count,
                   const int32_t* sums, int64_t sum_stride) {
  if (p.out_dtype == DType::kInt32) {
    auto* out = static_cast<int32_t*>(p.out);
    for (int64_t row = rows.begin; row < rows.end; ++row, sums += sum_stride) {
      store_ints<V>(out + row * p.n + col, count, V::load_ints(sums));
    }
    return;
  }
  with_float_dtype(p.out_dtype, [&](auto dtype) {
    scale_and_store<V, decltype(dtype)::value>(p, rows, col, count, sums, sum_stride);
  });
}

// What an accumulator must start from so that the sum of a * (w + kWeightOffset) ends as a * w.
// Modulo 2^32: the final sum fits into int32, so wrapping on the way is harmless.
template <typename V>
int32_t start_value(const int8_t* a_row, int64_t k) {
  if constexpr (V::kWeightOffset == 0) {
    return 0;
  } else {
    typename V::Int acc = V::zero();
    const typename V::Int ones = V::unit_weights();
    int64_t at = 0;
    for (; at + V::kChunk <= k; at += V::kChunk) acc = V::dot(acc, ones, V::operand(a_row + at));
    if (at < k) acc = V::dot(acc, ones, V::operand_tail(a_row, at, k));
    const uint32_t sum = static_cast<uint32_t>(V::horizontal_sum(acc));
    return static_cast<int32_t>(0U - static_cast<uint32_t>(V::kWeightOffset) * sum);
  }
}

// ---- dot path ---------------------------------------------------------------------------------

// kRows rows of a times kCols rows of w; sums[i * V::kLanes + j].
template <typename V, int kRows, int kCols>
void dot_tile(const int8_t* a, const int8_t* const* w, int64_t k, const int32_t* start,
              int32_t* sums) {
  using Int = typename V::Int;
  Int acc[kRows][kCols];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) acc[i][j] = V::zero();
  }
  const auto step = [&](auto load_operand) __attribute__((always_inline)) {
    Int a_chunk[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) a_chunk[i] = load_operand(a + i * k);
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) {
      const Int w_chunk = V::as_weights(load_operand(w[j]));
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) acc[i][j] = V::dot(acc[i][j], w_chunk, a_chunk[i]);
    }
  };
  int64_t at = 0;
  for (; at + V::kChunk <= k; at += V::kChunk) {
    step([&](const int8_t* row) __attribute__((always_inline)) { return V::operand(row + at); });
  }
  // Past K both operands are zero; as weights that may be kWeightOffset, times zero.
  if (at < k) {
    step([&](const int8_t* row)
             __attribute__((always_inline)) { return V::operand_tail(row, at, k); });
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kCols; j += 4) {
      V::store_four_sums(sums + i * V::kLanes + j, acc[i][j], acc[i][j + 1], acc[i][j + 2],
                         acc[i][j + 3], start[i]);
    }
  }
}

// Calls dot_tile for `rows` in 1..kRows.
template <typename V, int kRows>
void dot_rows(int64_t rows, const int8_t* a, const int8_t* const* w, int64_t k,
              const int32_t* start, int32_t* sums) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return dot_rows<V, kRows - 1>(rows, a, w, k, start, sums);
  }
  constexpr int kCols = kRows == 1 ? V::kDotColsOneRow : 4;
  for (int j = 0; j < V::kLanes; j += kCols) {
    dot_tile<V, kRows, kCols>(a, w + j, k, start, sums + j);
  }
}

template <typename V>
void matmul_dot(const MatmulParams& p, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < p.m; row += V::kDotRows) {
    const int64_t rows = least(p.m - row, V::kDotRows);
    const int8_t* a = p.a + row * p.k;
    int32_t start[V::kDotRows];
    for (int64_t i = 0; i < rows; ++i) start[i] = start_value<V>(a + i * p.k, p.k);
    for (int64_t col = begin; col < end; col += V::kLanes) {
      const int64_t count = least(end - col, V::kLanes);
      // Lanes past the last column repeat it and are not stored.
      const int8_t* w[V::kLanes];
      for (int j = 0; j < V::kLanes; ++j) w[j] = p.w + (col + (j < count ? j : count - 1)) * p.k;
      alignas(64) int32_t sums[V::kDotRows * V::kLanes];
      dot_rows<V, V::kDotRows>(rows, a, w, p.k, start, sums);
      store_columns<V>(p, {row, row + rows}, col, count, sums, V::kLanes);
    }
  }
}

// ---- packed path ------------------------------------------------------------------------------

// Values [0, k) of `rows` (at most kLanes) rows that stand `stride` apart -> out[k / kGroup][lane],
// a group of 4 bytes a lane, step_bytes from one k-group to the next. Writes whole vectors: of
// step_bytes shorter than a vector the next step overwrites the overrun, and the last one's needs
// room behind it.
template <typename V, bool kWeights>
void pack_lanes(const int8_t* src, int64_t stride, int64_t k, int64_t rows, char* out,
                int64_t step_bytes) {
  const int8_t* row[V::kLanes];
  for (int i = 0; i < V::kLanes; ++i) row[i] = src + (i < rows ? i : rows - 1) * stride;
  const auto chunk = [&](auto load_operand) __attribute__((always_inline)) {
    typename V::Int t[V::kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < V::kLanes; ++i) {
      t[i] = load_operand(row[i]);
      if constexpr (kWeights) t[i] = V::as_weights(t[i]);
    }
    V::transpose(t);
#pragma GCC unroll 16
    for (int i = 0; i < V::kLanes; ++i) V::store_ints(out + i * step_bytes, t[i]);
    out += V::kLanes * step_bytes;
  };
  int64_t at = 0;
  for (; at + V::kChunk <= k; at += V::kChunk) {
    chunk([&](const int8_t* from) __attribute__((always_inline)) { return V::operand(from + at); });
  }
  if (at < k) {
    chunk([&](const int8_t* from)
              __attribute__((always_inline)) { return V::operand_tail(from, at, k); });
  }
}

inline char* block_at(const MatmulParams& p, const MatmulPlan& plan, int64_t block) {
  return static_cast<char*>(p.workspace) + block * plan.block_bytes;
}

template <typename V>
void pack_row_blocks(const MatmulParams& p, const MatmulPlan& plan, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const Range rows = part_of(p.m, plan.row_blocks, block);
    const int64_t count = rows.end - rows.begin;
    const int8_t* a = p.a + rows.begin * p.k;
    char* out = block_at(p, plan, block);
    auto* start = reinterpret_cast<int32_t*>(out);
    for (int64_t i = 0; i < count; ++i) start[i] = start_value<V>(a + i * p.k, p.k);
    pack_lanes<V, false>(a, p.k, p.k, count, out + kBlockHeaderBytes, count * 4);
  }
}

template <typename V>
void pack_panel(const MatmulParams& p, const MatmulPlan& plan, Range cols, Range ks, char* panel) {
  constexpr int64_t kStepBytes = V::kTileCols * 4;
  for (int64_t col = cols.begin; col < cols.end; col += V::kTileCols) {
    for (int64_t v = 0; v < V::kTileCols && col + v < cols.end; v += V::kLanes) {
      const int8_t* w = p.w + (col + v) * p.k + ks.begin;
      const int64_t left = cols.end - col - v;
      pack_lanes<V, true>(w, p.k, ks.end - ks.begin, least(left, V::kLanes), panel + v * 4,
                          kStepBytes);
    }
    panel += plan.sliver_bytes;
  }
}

// kRows rows of packed a times one sliver, over `steps` k-groups, into sums [kRows, kTileCols].
// start: the accumulators' first values, one a row; null: go on from sums. Only sums leave the
// registers: with the epilogue in this function GCC spills the accumulators.
template <typename V, int kRows>
void register_tile(const char* a, const char* sliver, int64_t steps, const int32_t* start,
                   int32_t* sums) {
  using Int = typename V::Int;
  constexpr int kVecs = V::kTileCols / V::kLanes;
  Int acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      acc[i][v] = start != nullptr ? V::broadcast_int(start[i])
                                   : V::load_ints(sums + i * V::kTileCols + v * V::kLanes);
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
    Int w[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) w[v] = V::load_ints(sliver + v * V::kLanes * 4);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Int a_group = V::broadcast_group(a + i * 4);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[i][v] = V::dot(acc[i][v], w[v], a_group);
    }
    a += kRows * 4;
    sliver += V::kTileCols * 4;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      V::store_ints(sums + i * V::kTileCols + v * V::kLanes, acc[i][v]);
    }
  }
}

// Calls register_tile for `rows` in kTileMinRows..kRows, on k block `ks` of a packed row block.
template <typename V, int kRows>
void tile_rows(int64_t rows, const char* block, Range ks, const char* sliver, int32_t* sums) {
  if constexpr (kRows > V::kTileMinRows) {
    if (rows < kRows) return tile_rows<V, kRows - 1>(rows, block, ks, sliver, sums);
  }
  const int64_t steps = (ks.end - ks.begin + V::kGroup - 1) / V::kGroup;
  const char* a = block + kBlockHeaderBytes + ks.begin / V::kGroup * (kRows * 4);
  const auto* start = ks.begin == 0 ? reinterpret_cast<const int32_t*>(block) : nullptr;
  register_tile<V, kRows>(a, sliver, steps, start, sums);
}

// Row blocks `blocks` times one packed panel: columns `cols` of out, k block `ks`. After the last k
// block the sums go through the epilogue to out.
template <typename V>
void multiply_panel(const MatmulParams& p, const MatmulPlan& plan, Range blocks, Range cols,
                    Range ks, const char* panel, int32_t* partial) {
  constexpr int64_t kTileSums = V::kTileRows * V::kTileCols;
  alignas(64) int32_t whole[kTileSums];
  for (int64_t b = blocks.begin; b < blocks.end; ++b) {
    const Range rows = part_of(p.m, plan.row_blocks, b);
    const char* sliver = panel;
    for (int64_t col = cols.begin; col < cols.end; col += V::kTileCols) {
      int32_t* sums = plan.k_block < p.k ? partial : whole;
      tile_rows<V, V::kTileRows>(rows.end - rows.begin, block_at(p, plan, b), ks, sliver, sums);
      for (int64_t v = 0; ks.end == p.k && v < V::kTileCols && col + v < cols.end; v += V::kLanes) {
        const int64_t left = cols.end - col - v;
        store_columns<V>(p, rows, col + v, least(left, V::kLanes), sums + v, V::kTileCols);
      }
      sliver += plan.sliver_bytes;
      partial += kTileSums;
    }
  }
}

template <typename V>
void matmul_task(const MatmulParams& p, const MatmulPlan& plan, int64_t task) {
  // An even split leaves no block below half of the tile, save where m itself is that small.
  static_assert(V::kTileMinRows <= (V::kTileRows + 1) / 2 && V::kTileMinRows <= V::kDotMaxRows + 1,
                "some row block would have no tile");
  char* panel = block_at(p, plan, plan.row_blocks) + task * plan.task_bytes;
  auto* partial = reinterpret_cast<int32_t*>(panel + plan.panel_bytes);
  const Range blocks = part_of(plan.row_blocks, plan.m_tasks, task / plan.n_tasks);
  const int64_t slivers = (p.n + V::kTileCols - 1) / V::kTileCols;
  const Range own = part_of(slivers, plan.n_tasks, task % plan.n_tasks);
  const int64_t n_end = least(own.end * V::kTileCols, p.n);

  for (int64_t b = blocks.begin; b < blocks.end; b += plan.pass_blocks) {
    const Range pass = {b, least(b + plan.pass_blocks, blocks.end)};
    for (int64_t col = own.begin * V::kTileCols; col < n_end; col += plan.panel_cols) {
      const Range cols = {col, least(col + plan.panel_cols, n_end)};
      for (int64_t k = 0; k < p.k; k += plan.k_block) {
        const Range ks = {k, least(k + plan.k_block, p.k)};
        pack_panel<V>(p, plan, cols, ks, panel);
        multiply_panel<V>(p, plan, pass, cols, ks, panel, partial);
      }
    }
  }
}

}  // namespace
}  // namespace int8_ops::cpu
