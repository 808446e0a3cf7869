#include "tensor_map.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace int8_ops::cuda::sm90 {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver that is loaded, so that nothing links to libcuda: a build machine has none.
Encode encode_function() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                                12000, cudaEnableDefault, &result);
    if (status != cudaSuccess || result != cudaDriverEntryPointSuccess || function == nullptr) {
      throw std::runtime_error("int8_ops: the CUDA driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<Encode>(function);
  }();
  return found;
}

constexpr int kMaxDimensions = 4;

// sizes from the innermost dimension on, strides from the next one's on.
template <size_t kCount>
CUtensorMap encode(const void* base, int32_t element_bytes, const cuuint64_t (&sizes)[kCount],
                   const cuuint64_t (&stride_bytes)[kCount - 1], int32_t box_rows) {
  static_assert(kCount <= kMaxDimensions);
  const cuuint32_t box[kMaxDimensions] = {static_cast<cuuint32_t>(128 / element_bytes),
                                          static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t element_strides[kMaxDimensions] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status = encode_function()(
      &map, element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16,
      kCount, const_cast<void*>(base), sizes, stride_bytes, box, element_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("int8_ops: cuTensorMapEncodeTiled failed with CUresult " +
                             std::to_string(static_cast<int>(status)));
  }
  return map;
}

}  // namespace

CUtensorMap make_tensor_map(const void* base, int64_t rows, int64_t cols, int32_t element_bytes,
                            int32_t box_rows) {
  return encode<2>(base, element_bytes,
                   {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)},
                   {static_cast<cuuint64_t>(cols * element_bytes)}, box_rows);
}

CUtensorMap make_tensor_map(const ByteRows& rows, int32_t box_rows) {
  // Strides of dimensions of one are never used, and may be what the encoder refuses.
  const auto stride = [](int64_t count, int64_t bytes, int64_t instead) {
    return static_cast<cuuint64_t>(count > 1 ? bytes : instead);
  };
  const cuuint64_t row = stride(rows.rows, rows.row_stride, (rows.width + 15) / 16 * 16);
  const cuuint64_t group = stride(rows.groups, rows.group_stride, static_cast<int64_t>(row));
  const cuuint64_t batch = stride(rows.batch, rows.batch_stride, static_cast<int64_t>(group));
  return encode<4>(rows.base, 1,
                   {static_cast<cuuint64_t>(rows.width), static_cast<cuuint64_t>(rows.rows),
                    static_cast<cuuint64_t>(rows.groups), static_cast<cuuint64_t>(rows.batch)},
                   {row, group, batch}, box_rows);
}

}  // namespace int8_ops::cuda::sm90
