#include "matmul_plan.h"

#include <algorithm>

namespace int8_ops::cpu {
namespace {

// A task should be worth more than waking a thread for it (a few microseconds). Unit: multiply-adds
// of one row of a; reading w counts like kReadRows rows, packing it like kPackRows.
constexpr int64_t kMinTaskCost = 1 << 20;
constexpr int64_t kReadRows = 8;
constexpr int64_t kPackRows = 8;

// A panel of w should fill about a third of a core's L2 cache, so that it stays there while the row
// blocks pass by.
constexpr int64_t kPanelBytes = 320 * 1024;

// Long rows are cut, else a panel would be so narrow that all of a passes by for a few columns. The
// partial sums of a pass then stay in the cache as well.
constexpr int64_t kMaxKBlock = 2048;
constexpr int64_t kPartialBytes = 256 * 1024;

constexpr int64_t kGroupBytes = 4;
constexpr int64_t kOverrunBytes = 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

int64_t worthwhile_tasks(int64_t m, int64_t n, int64_t k, int64_t threads) {
  return std::clamp<int64_t>((m + kReadRows) * n * k / kMinTaskCost, 1, threads);
}

// The grid of at most max_tasks whose largest task is cheapest.
void choose_grid(MatmulPlan& plan, const TileShape& tile, int64_t m, int64_t slivers,
                 int64_t max_tasks) {
  const int64_t block_rows = ceil_div(m, plan.row_blocks);
  int64_t best = -1;
  for (int64_t n_tasks = 1; n_tasks <= std::min(max_tasks, slivers); ++n_tasks) {
    const int64_t m_tasks = std::min(max_tasks / n_tasks, plan.row_blocks);
    const int64_t cost = (ceil_div(plan.row_blocks, m_tasks) * block_rows + kPackRows) *
                         ceil_div(slivers, n_tasks) * tile.cols;
    if (best >= 0 && cost >= best) continue;
    best = cost;
    plan.m_tasks = m_tasks;
    plan.n_tasks = n_tasks;
  }
  plan.tasks = plan.m_tasks * plan.n_tasks;
}

}  // namespace

MatmulPlan plan_matmul(int64_t m, int64_t n, int64_t k, const TileShape& tile, int64_t threads) {
  MatmulPlan plan;
  const int64_t max_tasks = worthwhile_tasks(m, n, k, threads);
  plan.packed = tile.max_rows > 0 && m > tile.dot_max_rows;
  if (!plan.packed) {
    plan.tasks = plan.n_tasks = std::min(max_tasks, n);
    return plan;
  }
  plan.row_blocks = ceil_div(m, tile.max_rows);
  const int64_t slivers = ceil_div(n, tile.cols);
  choose_grid(plan, tile, m, slivers, max_tasks);

  const int64_t k_blocks = ceil_div(k, kMaxKBlock);
  plan.k_block = round_up(ceil_div(k, k_blocks), tile.k_chunk);
  const int64_t step_bytes = tile.cols * kGroupBytes;
  plan.sliver_bytes = plan.k_block / tile.k_group * step_bytes;
  const int64_t panel_slivers =
      std::clamp<int64_t>(kPanelBytes / plan.sliver_bytes, 1, ceil_div(slivers, plan.n_tasks));
  plan.panel_cols = panel_slivers * tile.cols;
  plan.panel_bytes = panel_slivers * plan.sliver_bytes;
  plan.task_bytes = plan.panel_bytes;
  plan.pass_blocks = plan.row_blocks;
  if (k_blocks > 1) {
    const int64_t block_partials = panel_slivers * tile.max_rows * step_bytes;
    plan.pass_blocks = std::clamp<int64_t>(kPartialBytes / block_partials, 1,
                                           ceil_div(plan.row_blocks, plan.m_tasks));
    plan.task_bytes += plan.pass_blocks * block_partials;
  }

  const int64_t steps = round_up(k, tile.k_chunk) / tile.k_group;
  const int64_t block_rows = ceil_div(m, plan.row_blocks);
  plan.block_bytes =
      round_up(kBlockHeaderBytes + steps * block_rows * kGroupBytes + kOverrunBytes, 64);
  plan.workspace_bytes = plan.row_blocks * plan.block_bytes + plan.tasks * plan.task_bytes;
  return plan;
}

}  // namespace int8_ops::cpu
