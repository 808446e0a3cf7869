// The CUDA implementations: device, stream and launchers behind the op bodies of op_impl.h.
#include <Python.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../common/op_impl.h"
#include "attention/append.h"
#include "attention/decode.h"
#include "dispatch.h"
#include "quantize/quantize.h"

namespace int8_ops::cuda {
namespace {

struct CudaPolicy {
  // Makes the tensor's device current. Most callers are on it already: then nothing is switched.
  struct Guard {
    explicit Guard(const Tensor& t) {
      int current = -1;
      if (cudaGetDevice(&current) != cudaSuccess || current != t.get_device_index()) {
        guard.emplace(t.get_device_index());
      }
    }
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
  };

  static ExecContext context(const Tensor& t) {
    ExecContext ctx;
    ctx.device_index = t.get_device_index();
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(ctx.device_index, &ctx.stream));
    require_supported_device(ctx);
    return ctx;
  }

  static void quantize(const QuantizeParams& p) {
    p.scale_per_col ? quantize_cols(p) : quantize_rows(p);
  }
  static void dequantize(const DequantizeParams& p) { cuda::dequantize(p); }
  static int64_t matmul_workspace_bytes(MatmulParams& p) { return cuda::matmul_workspace_bytes(p); }
  static void matmul(MatmulParams& p) { cuda::matmul(p); }
  static void latent_append(const LatentAppendParams& p) { attention::append_latents(p); }
  static int64_t latent_attention_workspace_bytes(const LatentAttentionParams& p) {
    return cuda::latent_attention_workspace_bytes(p);
  }
  static void latent_attention(const LatentAttentionParams& p) { cuda::latent_attention(p); }
};

}  // namespace
}  // namespace int8_ops::cuda

STABLE_TORCH_LIBRARY_IMPL(int8_ops, CUDA, m) {
  using namespace int8_ops;
  INT8_OPS_REGISTER_IMPLS(m, cuda::CudaPolicy);
  m.impl("latent_append", TORCH_BOX(&OpImpl<cuda::CudaPolicy>::latent_append));
  m.impl("latent_attention_decode", TORCH_BOX(&OpImpl<cuda::CudaPolicy>::latent_attention_decode));
}

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
