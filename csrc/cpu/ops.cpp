// The CPU implementations: torch's thread pool around the kernel table of cpu/dispatch.h.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "../common/op_impl.h"
#include "../common/quantized_rows.h"
#include "dispatch.h"
#include "latent_append.h"

namespace int8_ops::cpu {
namespace {

// Enough elements to quantize, dequantize or pack (a few a nanosecond) that waking a thread for
// them is small beside the work.
constexpr int64_t kMinElementsPerTask = 32 * 1024;

int64_t grain(int64_t elements_per_index) {
  return elements_per_index >= kMinElementsPerTask ? 1 : kMinElementsPerTask / elements_per_index;
}

struct CpuPolicy {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static ExecContext context(const Tensor&) { return {}; }

  static void quantize(const QuantizeParams& p) {
    const KernelTable& table = kernels();
    const auto run = p.scale_per_col ? table.quantize_cols : table.quantize_rows;
    torch::stable::parallel_for(0, p.scale_per_col ? p.cols : p.rows,
                                grain(p.scale_per_col ? p.rows : p.cols),
                                [&](int64_t begin, int64_t end) { run(p, begin, end); });
  }

  static void dequantize(const DequantizeParams& p) {
    const auto run = kernels().dequantize;
    torch::stable::parallel_for(0, p.rows * p.cols, kMinElementsPerTask,
                                [&](int64_t begin, int64_t end) { run(p, begin, end); });
  }

  static int64_t matmul_workspace_bytes(const MatmulParams& p) {
    return plan(p).workspace_bytes + (p.x != nullptr ? quantized_rows_bytes(p) : 0);
  }

  static void matmul(MatmulParams& p) {
    if (p.x != nullptr) quantize(place_quantized_rows(p));
    const KernelTable& table = kernels();
    const MatmulPlan how = plan(p);
    if (!how.packed) {
      torch::stable::parallel_for(0, how.tasks, 1, [&](int64_t begin, int64_t end) {
        table.matmul_dot(p, part_of(p.n, how.tasks, begin).begin,
                         part_of(p.n, how.tasks, end).begin);
      });
      return;
    }
    torch::stable::parallel_for(
        0, how.row_blocks, grain(p.k * p.m / how.row_blocks),
        [&](int64_t begin, int64_t end) { table.pack_row_blocks(p, how, begin, end); });
    torch::stable::parallel_for(0, how.tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) table.matmul_task(p, how, task);
    });
  }

  static int64_t latent_attention_workspace_bytes(const LatentAttentionParams& p) {
    return plan(p).workspace_bytes;
  }

  static void latent_attention(const LatentAttentionParams& p) {
    check_key_scales(p);
    const KernelTable& table = kernels();
    const LatentAttentionPlan how = plan(p);
    auto* base = static_cast<char*>(p.workspace);
    fill_offset_table(p, how);
    if (table.pack_keys != nullptr) {
      const int64_t elements = how.tasks > 0 ? p.k.slices[0].rank * p.head_dim : 1;
      torch::stable::parallel_for(
          0, how.tasks > 0 ? p.kv_heads : 0, grain(elements),
          [&](int64_t begin, int64_t end) { table.pack_keys(p, how, begin, end); });
    }
    torch::stable::parallel_for(0, how.workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        char* scratch = base + how.scratch + worker * how.scratch_bytes;
        const Range tasks = part_of(how.tasks, how.workers, worker);
        for (int64_t task = tasks.begin; task < tasks.end; ++task) {
          fill_base_angles(p, how, task, scratch);
          table.attend_split(p, how, task, scratch);
        }
      }
    });
    torch::stable::parallel_for(
        0, p.batch * p.kv_heads, grain(p.v.slices[0].rank * p.head_dim * how.head_rows),
        [&](int64_t begin, int64_t end) { table.combine_attention(p, how, begin, end); });
  }

  static void latent_append(const LatentAppendParams& p) {
    for (int64_t i = 0; i < p.tokens; ++i) {
      INT8_OPS_CHECK(p.slots[i] >= 0 && p.slots[i] < p.capacity,
                     "latent_append: expected slots from "
                     "0 to ",
                     p.capacity - 1, ", got ", p.slots[i]);
    }
    torch::stable::parallel_for(0, p.batch * p.groups * p.tokens, grain(p.k.slices[0].rank),
                                [&](int64_t begin, int64_t end) {
                                  append_latents(p, kernels().quantize_rows, begin, end);
                                });
  }

 private:
  // Of each slice; NaN passes as a scale of both channels.
  static void check_key_scales(const LatentAttentionParams& p) {
    const int64_t half = p.head_dim / 2;
    for (int64_t n = 0; n < p.k.count; ++n) {
      for (int64_t head = 0; head < p.kv_heads; ++head) {
        const float* const scales = p.k.slices[n].a_scale + head * p.head_dim;
        for (int64_t channel = 0; channel < half; ++channel) {
          const float first = scales[channel];
          const float second = scales[channel + half];
          INT8_OPS_CHECK(first == second || (std::isnan(first) && std::isnan(second)),
                         "latent_attention_decode: expected scales of A of k that are the same for "
                         "the two channels of a RoPE pair, got ",
                         first, " for channel ", channel, " and ", second, " for channel ",
                         channel + half, " of KV head ", head, " in slice ", n);
        }
      }
    }
  }

  static LatentAttentionPlan plan(const LatentAttentionParams& p) {
    return plan_latent_attention(p, kernels().tile, torch::stable::get_num_threads());
  }
  static MatmulPlan plan(const MatmulParams& p) {
    return plan_matmul(p.m, p.n, p.k, kernels().tile, torch::stable::get_num_threads());
  }
};

}  // namespace
}  // namespace int8_ops::cpu

STABLE_TORCH_LIBRARY_IMPL(int8_ops, CPU, m) {
  using namespace int8_ops;
  INT8_OPS_REGISTER_IMPLS(m, cpu::CpuPolicy);
  m.impl("latent_attention_decode", TORCH_BOX(&OpImpl<cpu::CpuPolicy>::latent_attention_decode));
  m.impl("latent_append", TORCH_BOX(&OpImpl<cpu::CpuPolicy>::latent_append));
}
