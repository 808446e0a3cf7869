#include "latent_attention_plan.h"

#include <algorithm>
#include <cmath>
#include <complex>

namespace int8_ops::cpu {
namespace {

constexpr int64_t kAlign = 64;
// A vector store that starts at the last group of a row block may run this far over it.
constexpr int64_t kOverrunBytes = 64;
// Tasks a thread: heads of a split are shared out only where splits alone keep too few threads
// busy.
constexpr int64_t kTasksPerThread = 2;

// Hands out aligned pieces one after another.
class Layout {
 public:
  int64_t take(int64_t bytes) {
    const int64_t at = end_;
    end_ += round_up(bytes, kAlign);
    return at;
  }
  int64_t end() const { return end_; }

 private:
  int64_t end_ = 0;
};

std::complex<double> unit(double angle) { return {std::cos(angle), std::sin(angle)}; }

int64_t floats(int64_t count) { return count * static_cast<int64_t>(sizeof(float)); }

int64_t largest_rank(const LatentStream& s) {
  int64_t largest = 0;
  for (int64_t i = 0; i < s.count; ++i) largest = std::max(largest, s.slices[i].rank);
  return largest;
}

}  // namespace

LatentAttentionPlan plan_latent_attention(const LatentAttentionParams& p, const TileShape& tile,
                                          int64_t threads) {
  LatentAttentionPlan plan;
  plan.group_heads = p.kv_heads / p.groups;
  plan.repeats = p.heads / p.kv_heads;
  plan.head_rows = plan.repeats * p.q_len;
  for (int64_t b = 0; b < p.batch; ++b) {
    const DecodeRow row = decode_row(p, b);
    plan.splits = std::max(plan.splits, row.last_split - row.first_split);
  }
  const int64_t splits = p.batch * p.groups * plan.splits;
  const int64_t wanted = threads > 1 ? kTasksPerThread * threads : 1;
  plan.head_parts = std::clamp<int64_t>((wanted + splits - 1) / std::max<int64_t>(splits, 1), 1,
                                        plan.group_heads);
  plan.tasks = splits * plan.head_parts;
  plan.workers = std::min(plan.tasks, threads);
  plan.half_stride = round_up(p.head_dim / 2, kFloatPad);

  Layout whole;
  plan.offsets = whole.take(floats(p.head_dim * kRopeTile));
  if (tile.max_rows > 0) {
    plan.blocks = (p.head_dim + tile.max_rows - 1) / tile.max_rows;
    for (int64_t i = 0; i < p.k.count; ++i) {
      const int64_t steps = round_up(p.k.slices[i].rank, tile.k_chunk) / tile.k_group;
      plan.a_block_bytes[i] =
          round_up(kBlockHeaderBytes + steps * tile.max_rows * 4 + kOverrunBytes, kAlign);
      plan.packed_a[i] = whole.take(p.kv_heads * plan.blocks * plan.a_block_bytes[i]);
      plan.k_sliver_bytes[i] = steps * tile.cols * 4;
    }
  }
  for (int64_t i = 0; i < p.v.count; ++i) {
    plan.v_column[i] = plan.sum_columns;
    plan.sum_columns += round_up(p.v.slices[i].rank, kFloatPad);
  }
  plan.partial_floats = plan.sum_columns + kFloatPad;
  plan.partials =
      whole.take(floats(splits * plan.group_heads * plan.head_rows * plan.partial_floats));

  Layout own;
  const int64_t query_bytes = floats(plan.head_rows * 2 * plan.half_stride);
  const int64_t rows =
      plan.head_rows * ((plan.group_heads + plan.head_parts - 1) / plan.head_parts);
  plan.base_angles = own.take(floats(kTilesPerSplit * 2 * plan.half_stride));
  plan.query = own.take(query_bytes);
  plan.folded = own.take(query_bytes * (p.k.count + 1));
  // A row block has at least as many rows as the register tile wants: head_dim may be less.
  plan.sums = own.take((p.head_dim + tile.max_rows) * kRopeTile * 4);
  plan.token_scale = own.take(floats(kMaxSlices * kSplitTokens));
  plan.scores = own.take(floats(rows * kSplitTokens));
  plan.weights = own.take(floats(rows * kSplitTokens));
  const int64_t rank = std::max(largest_rank(p.k), largest_rank(p.v));
  plan.staged = own.take(kSplitTokens * round_up(rank, kFloatPad));
  if (tile.max_rows > 0) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < p.k.count; ++i) {
      bytes += kSplitTokens / tile.cols * plan.k_sliver_bytes[i];
    }
    plan.k_packed = own.take(bytes);
  }
  plan.scratch_bytes = own.end();
  plan.scratch = whole.take(plan.workers * plan.scratch_bytes);
  plan.workspace_bytes = whole.end();
  return plan;
}

void fill_offset_table(const LatentAttentionParams& p, const LatentAttentionPlan& plan) {
  auto* table = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + plan.offsets);
  for (int64_t j = 0; j < p.head_dim / 2; ++j) {
    const std::complex<double> step = unit(static_cast<double>(p.inv_freq[j]));
    std::complex<double> turned = 1.0;
    for (int64_t i = 0; i < kRopeTile; ++i) {
      table[(2 * j) * kRopeTile + i] = static_cast<float>(turned.real());
      table[(2 * j + 1) * kRopeTile + i] = static_cast<float>(turned.imag());
      turned *= step;
    }
  }
}

void fill_base_angles(const LatentAttentionParams& p, const LatentAttentionPlan& plan, int64_t task,
                      char* scratch) {
  const DecodeTask what = decode_task(plan, p, task);
  const DecodeRow row = decode_row(p, what.batch);
  const int64_t token = row.begin + (row.first_split + what.split) * kSplitTokens;
  const int64_t origin = p.origin != nullptr ? p.origin[what.batch] : -row.begin;
  auto* table = reinterpret_cast<float*>(scratch + plan.base_angles);
  for (int64_t j = 0; j < p.head_dim / 2; ++j) {
    const auto frequency = static_cast<double>(p.inv_freq[j]);
    const std::complex<double> step = unit(frequency * kRopeTile);
    std::complex<double> turned = unit(static_cast<double>(origin + token) * frequency);
    for (int64_t tile = 0; tile < kTilesPerSplit; ++tile) {
      table[(2 * tile) * plan.half_stride + j] = static_cast<float>(turned.real());
      table[(2 * tile + 1) * plan.half_stride + j] = static_cast<float>(turned.imag());
      turned *= step;
    }
  }
}

}  // namespace int8_ops::cpu
