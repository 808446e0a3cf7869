// Tensor maps: what the copy engine must know of a matrix to cut boxes out of it.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace int8_ops::cuda::sm90 {

// Boxes of [box_rows, 128 bytes] of a row-major [rows, cols] matrix of 1- or 2-byte elements,
// swizzled 128 bytes in shared memory. Beyond the edges loads give zeros and stores write nothing.
// A row has a multiple of 16 bytes, and the pointer is aligned to as many.
CUtensorMap make_tensor_map(const void* base, int64_t rows, int64_t cols, int32_t element_bytes,
                            int32_t box_rows);

// Where rows of bytes [width] lie: [batch, groups, rows], strides in bytes, multiples of 16 where
// there is more than one.
struct ByteRows {
  const void* base;
  int64_t width;
  int64_t rows;
  int64_t groups;
  int64_t batch;
  int64_t row_stride;
  int64_t group_stride;
  int64_t batch_stride;
};

// Boxes of [box_rows, 128 bytes] of one group of one batch row, as above.
CUtensorMap make_tensor_map(const ByteRows& rows, int32_t box_rows);

}  // namespace int8_ops::cuda::sm90
