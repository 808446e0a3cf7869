// Vectors to and from memory with dtype and tail, shared by the instruction sets. A tail goes
// through a buffer on the stack: nothing outside a tensor is ever read or written.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/params.h"

namespace int8_ops::cpu {
namespace {

template <DType kDType>
struct DTypeTag {
  static constexpr DType value = kDType;
  static constexpr int64_t bytes = kDType == DType::kFloat32 ? 4 : 2;
};

// Calls fn with the tag of a float dtype, which ops.cpp has checked.
template <typename Fn>
inline void with_float_dtype(DType dtype, const Fn& fn) {
  if (dtype == DType::kFloat32) {
    fn(DTypeTag<DType::kFloat32>{});
  } else if (dtype == DType::kFloat16) {
    fn(DTypeTag<DType::kFloat16>{});
  } else {
    fn(DTypeTag<DType::kBFloat16>{});
  }
}

// Elements [at, at + count) of base as float32; lanes past count are 0.
template <typename V, DType kDType>
inline typename V::Float load_floats(const void* base, int64_t at, int64_t count) {
  constexpr int64_t kBytes = DTypeTag<kDType>::bytes;
  const char* from = static_cast<const char*>(base) + at * kBytes;
  alignas(64) char buffer[V::kLanes * kBytes];
  if (count < V::kLanes) {
    std::memset(buffer, 0, sizeof buffer);
    std::memcpy(buffer, from, count * kBytes);
    from = buffer;
  }
  if constexpr (kDType == DType::kFloat32) return V::load_float32(from);
  if constexpr (kDType == DType::kFloat16) return V::load_float16(from);
  if constexpr (kDType == DType::kBFloat16) return V::load_bfloat16(from);
}

template <typename V, DType kDType>
inline void store_whole(void* to, typename V::Float x) {
  if constexpr (kDType == DType::kFloat32) V::store_float32(to, x);
  if constexpr (kDType == DType::kFloat16) V::store_float16(to, x);
  if constexpr (kDType == DType::kBFloat16) V::store_bfloat16(to, x);
}

template <typename V, DType kDType>
inline void store_floats(void* base, int64_t at, int64_t count, typename V::Float x) {
  constexpr int64_t kBytes = DTypeTag<kDType>::bytes;
  char* to = static_cast<char*>(base) + at * kBytes;
  if (count == V::kLanes) return store_whole<V, kDType>(to, x);
  alignas(64) char buffer[V::kLanes * kBytes];
  store_whole<V, kDType>(buffer, x);
  std::memcpy(to, buffer, count * kBytes);
}

template <typename V>
inline void store_ints(int32_t* to, int64_t count, typename V::Int x) {
  if (count == V::kLanes) return V::store_ints(to, x);
  alignas(64) int32_t buffer[V::kLanes];
  V::store_ints(buffer, x);
  std::memcpy(to, buffer, count * sizeof(int32_t));
}

template <typename V>
inline typename V::Float load_int8(const int8_t* from, int64_t count) {
  if (count == V::kLanes) return V::load_int8(from);
  int8_t buffer[V::kLanes] = {};
  std::memcpy(buffer, from, count);
  return V::load_int8(buffer);
}

template <typename V>
inline void store_int8(int8_t* to, int64_t count, typename V::Int x) {
  if (count == V::kLanes) return V::store_int8(to, x);
  int8_t buffer[V::kLanes];
  V::store_int8(buffer, x);
  std::memcpy(to, buffer, count);
}

}  // namespace
}  // namespace int8_ops::cpu
