// The table of CPU kernels, one an instruction set. A kernel works on a range of an index space so
// that ops.cpp can hand ranges to torch's thread pool; nothing here includes torch.
//
// Assumed of the caller's floating-point state: round to nearest even, which is the default of
// every thread. Flushing of subnormals (torch.set_flush_denormal) acts here as it does in torch
// itself.
#pragma once

#include "../common/params.h"
#include "latent_attention_plan.h"
#include "matmul_plan.h"

namespace int8_ops::cpu {

struct KernelTable {
  const char* isa;

  // Scales a row: rows [begin, end).
  void (*quantize_rows)(const QuantizeParams& p, int64_t begin, int64_t end);
  // Scales a column: columns [begin, end).
  void (*quantize_cols)(const QuantizeParams& p, int64_t begin, int64_t end);
  // Elements [begin, end) of the flattened matrix.
  void (*dequantize)(const DequantizeParams& p, int64_t begin, int64_t end);

  // The two ways through a matmul: see Note [Two matmul paths] in matmul_plan.h.
  TileShape tile;
  // Rows [begin, end) of w, that is columns of out, straight from a and w.
  void (*matmul_dot)(const MatmulParams& p, int64_t begin, int64_t end);
  // Row blocks [begin, end) of a into the workspace. Null, as the next, where tile.max_rows is 0.
  void (*pack_row_blocks)(const MatmulParams& p, const MatmulPlan& plan, int64_t begin,
                          int64_t end);
  // One task of the plan, after every row block has been packed.
  void (*matmul_task)(const MatmulParams& p, const MatmulPlan& plan, int64_t task);

  // latent_attention_decode, in this order: see Note [Splits of a row] in latent_attention_plan.h.
  // The keys' A of KV heads [begin, end) into the workspace. Null where tile.max_rows is 0.
  void (*pack_keys)(const LatentAttentionParams& p, const LatentAttentionPlan& plan, int64_t begin,
                    int64_t end);
  // One task of the plan; its base angles are in the scratch already.
  void (*attend_split)(const LatentAttentionParams& p, const LatentAttentionPlan& plan,
                       int64_t task, char* scratch);
  // Rows times KV heads [begin, end), after every task: to out.
  void (*combine_attention)(const LatentAttentionParams& p, const LatentAttentionPlan& plan,
                            int64_t begin, int64_t end);
};

// Of portable_latent_attention.cpp.
void attend_split_portable(const LatentAttentionParams& p, const LatentAttentionPlan& plan,
                           int64_t task, char* scratch);
void combine_attention_portable(const LatentAttentionParams& p, const LatentAttentionPlan& plan,
                                int64_t begin, int64_t end);

extern const KernelTable kPortableKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512VnniKernels;
#endif

}  // namespace int8_ops::cpu
