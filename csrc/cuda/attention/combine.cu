#include "../launch.cuh"
#include "combine.cuh"
#include "combine.h"

namespace int8_ops::cuda::attention {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t query_rows(const LatentAttentionParams& p, const Partials& partials) {
  return p.batch * p.groups * partials.group_rows;
}

}  // namespace

int64_t folded_bytes(const LatentAttentionParams& p, const Partials& partials) {
  return query_rows(p, partials) * partials.columns * static_cast<int64_t>(sizeof(float));
}

void combine(const LatentAttentionParams& p, const Partials& partials, float* folded) {
  CombineArgs args{};
  args.p = p;
  args.partials = partials;
  args.folded = folded;
  args.chunks = static_cast<int32_t>(ceil_div(partials.columns, kFoldVectors * 4));
  args.head_rows = static_cast<int32_t>(p.heads / p.kv_heads * p.q_len);
  args.row_tiles = static_cast<int32_t>(ceil_div(args.head_rows, kProjectRows));
  args.parts = static_cast<int32_t>(ceil_div(p.head_dim, kBlockElements));
  for (int64_t n = 0; n < p.v.count; ++n) {
    args.vector_a[n] = p.v.slices[n].rank % 4 == 0 && is_aligned(p.v.slices[n].a, 4);
  }
  LaunchShape fold;
  fold.grid = dim3(checked_int32(query_rows(p, partials) * args.chunks, "blocks"));
  fold.block = dim3(kFoldThreads);
  launch<fold_splits_kernel>("latent_attention_decode", fold, p.ctx, args);
  LaunchShape project;
  project.grid = dim3(checked_int32(p.batch * p.kv_heads * args.row_tiles * args.parts, "blocks"));
  project.block = dim3(kProjectThreads);
  launch<project_kernel>("latent_attention_decode", project, p.ctx, args);
}

}  // namespace int8_ops::cuda::attention
