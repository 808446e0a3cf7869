#include <algorithm>

#include "../launch.cuh"
#include "general.cuh"
#include "general.h"

namespace int8_ops::cuda::attention {
namespace {

// Of a multiprocessor's shared memory, what the driver keeps for each block.
constexpr int64_t kReservedBytes = 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool all_multiples(const LatentSlice& s, int64_t bytes) {
  return is_aligned(s.q, bytes) && s.q_batch_stride % bytes == 0 && s.q_group_stride % bytes == 0 &&
         s.q_token_stride % bytes == 0 && width_of(s) % bytes == 0;
}

// With so many tiles of pairs in shared memory at once.
GeneralShared divide_shared(const GeneralArgs& args, int64_t rows, int64_t panel_tiles) {
  GeneralShared shared;
  int64_t end = 0;
  const auto take = [&](int64_t bytes) {
    const auto at = static_cast<uint32_t>(end);
    end += ceil_div(bytes, 16) * 16;
    return at;
  };
  const int64_t panel_rows = panel_tiles * kTileRows;
  const int64_t pairs = panel_tiles * kTilePairs;
  shared.a = take(args.a_in_shared ? panel_rows * args.pitch : 0);
  shared.a_scale = take(args.p.k.count * panel_rows * 4);
  shared.bias = take(panel_rows * 4);
  shared.table = take(kWarpTokens * (pairs + kTablePad) * 8);
  shared.queries = take(std::max(kWarps * rows * pairs * 8, rows * kThreads * 16));
  shared.plain = take(rows * 2 * pairs * 4);
  shared.scores = take(rows * kSplitTokens * 4);
  shared.weights = take(rows * kSplitTokens * 4);
  shared.k_scale = take(args.p.k.count * kSplitTokens * 4);
  shared.seen = take(rows * 8);
  shared.q_rows = take(rows * 8);
  shared.bytes = static_cast<uint32_t>(end);
  return shared;
}

// All of a head's pairs, or half of them and so on where a block has not as much shared memory.
void choose_panel(GeneralArgs& args, const DeviceFacts& device) {
  const int64_t limit = device.shared_bytes_per_block;
  args.a_in_shared = kTileRows * static_cast<int64_t>(args.pitch) < limit;
  if (divide_shared(args, kMaxRows, 1).bytes > limit) args.a_in_shared = false;
  args.panel_tiles = args.tiles;
  while (args.panel_tiles > 1 && divide_shared(args, kMaxRows, args.panel_tiles).bytes > limit) {
    args.panel_tiles = (args.panel_tiles + 1) / 2;
  }
}

template <int kRows, bool kHeld>
void launch_general(GeneralArgs& args, const DeviceFacts& device) {
  static_assert(kRows <= kMaxRows);
  const LatentAttentionParams& p = args.p;
  args.shared = divide_shared(args, kRows, args.panel_tiles);
  args.row_blocks = static_cast<int32_t>(ceil_div(args.head_rows, kRows));
  args.lanes = checked_int32(p.kv_heads * args.row_blocks, "blocks");
  const int64_t fit =
      (device.shared_bytes_per_block + kReservedBytes) / (args.shared.bytes + kReservedBytes);
  const int64_t per_sm = std::clamp<int64_t>(fit, 1, kBlocksPerSm<kRows, kHeld>);
  const int64_t wanted = ceil_div(per_sm * device.sm_count, args.lanes);
  args.workers = static_cast<int32_t>(std::min(p.batch * args.partials.splits, wanted));
  LaunchShape shape;
  shape.grid = dim3(checked_int32(static_cast<int64_t>(args.lanes) * args.workers, "blocks"));
  shape.block = dim3(kThreads);
  shape.shared_bytes = args.shared.bytes;
  launch<general_attend_kernel<kRows, kHeld>>("latent_attention_decode", shape, p.ctx, args);
}

template <bool kHeld>
void launch_for_rows(GeneralArgs& args, const DeviceFacts& device) {
  if (args.head_rows == 1) return launch_general<1, kHeld>(args, device);
  if (args.head_rows <= 4) return launch_general<4, kHeld>(args, device);
  launch_general<kMaxRows, kHeld>(args, device);
}

}  // namespace

void general_attend(const LatentAttentionParams& p, const Partials& partials,
                    const DeviceFacts& device) {
  if (partials.splits == 0) return;
  GeneralArgs args{};
  args.p = p;
  args.partials = partials;
  args.group_heads = static_cast<int32_t>(p.kv_heads / p.groups);
  args.repeats = static_cast<int32_t>(p.heads / p.kv_heads);
  args.head_rows = static_cast<int32_t>(args.repeats * p.q_len);
  args.tiles = static_cast<int32_t>(ceil_div(p.head_dim / 2, kTilePairs));
  bool wide = true;
  for (int64_t n = 0; n < p.k.count; ++n) {
    const LatentSlice& s = p.k.slices[n];
    args.steps += steps_of(s);
    args.wide_k[n] = all_multiples(s, 16);
    wide = wide && args.wide_k[n];
    args.wide_a[n] = is_aligned(s.a, 16) && s.rank % 16 == 0 && width_of(s) % 16 == 0;
  }
  for (int64_t n = 0; n < p.v.count; ++n) args.wide_v[n] = all_multiples(p.v.slices[n], 4);
  // Rows differ by half the banks: eight lanes then read from all of them.
  args.pitch = args.steps * kStepBytes + (args.steps % 2 == 0 ? kStepBytes : 0);
  choose_panel(args, device);
  if (args.steps > kHeldSteps || !wide) return launch_for_rows<false>(args, device);
  StepWalk walk = {args.p.k};
  for (int32_t i = 0; i < args.steps; ++i) args.held[i] = walk.next();
  launch_for_rows<true>(args, device);
}

}  // namespace int8_ops::cuda::attention
