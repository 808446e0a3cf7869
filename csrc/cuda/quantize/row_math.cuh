// The arithmetic of symmetric int8 quantization, exactly as the numerical contract has it
// (int8_ops/reference.py), on values held in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../../common/numerics.h"
#include "../ptx/max_nan.cuh"
#include "../ptx/rcp_approx.cuh"

namespace int8_ops::cuda {

// Eight neighbouring values: what a thread loads at once and writes as eight bytes.
inline constexpr int kChunk = 8;

// Exact conversions, spelled out: torch's flags disable the implicit ones.
__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// A chunk in its storage dtype, with the exact conversion to float32. load() takes it as streaming
// data: x is read once, and cache is better spent on q, which the matmul reads next. load_cached()
// is for an x that is read again, by this block or another.
template <typename T>
struct Chunk {
  static_assert(sizeof(T) == 2);
  uint4 raw;

  __device__ __forceinline__ void load(const T* from) {
    raw = __ldcs(reinterpret_cast<const uint4*>(from));
  }
  __device__ __forceinline__ void load_cached(const T* from) {
    raw = *reinterpret_cast<const uint4*>(from);
  }
  __device__ __forceinline__ void clear() { raw = make_uint4(0, 0, 0, 0); }

  __device__ __forceinline__ float amax() const {
    const float lo = pair_amax(max_pairs(raw.x, raw.y));
    return ptx::max_nan_f32(lo, pair_amax(max_pairs(raw.z, raw.w)));
  }

  // The same over several chunks. |x| in 16 bits compares like an unsigned integer, NaN above all.
  using Amax = uint32_t;
  static __device__ __forceinline__ float amax_of_bits(uint32_t bits) {
    if constexpr (std::is_same_v<T, __half>) {
      return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
    } else {
      return __uint_as_float(bits << 16);
    }
  }
  __device__ __forceinline__ void add_to(Amax& m) const {
    m = __vmaxu2(m, __vmaxu2(raw.x & 0x7fff7fffu, raw.y & 0x7fff7fffu));
    m = __vmaxu2(m, __vmaxu2(raw.z & 0x7fff7fffu, raw.w & 0x7fff7fffu));
  }
  static __device__ __forceinline__ float amax_of(Amax m) { return pair_amax(m); }

  // Half kHalf of the chunk: values 4 kHalf .. 4 kHalf + 3.
  template <int kHalf>
  __device__ __forceinline__ void to_float(float (&x)[4]) const {
    const uint32_t words[2] = {kHalf == 0 ? raw.x : raw.z, kHalf == 0 ? raw.y : raw.w};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (std::is_same_v<T, __half>) {
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
      } else {
        // A bfloat16 is the upper half of a float32.
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      }
    }
  }

 private:
  // max |.| of two pairs, kept as a pair; a NaN wins.
  static __device__ __forceinline__ uint32_t max_pairs(uint32_t a, uint32_t b) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    const Pair m = __hmax2_nan(__habs2(*reinterpret_cast<const Pair*>(&a)),
                               __habs2(*reinterpret_cast<const Pair*>(&b)));
    return *reinterpret_cast<const uint32_t*>(&m);
  }
  static __device__ __forceinline__ float pair_amax(uint32_t pair) {
    if constexpr (std::is_same_v<T, __half>) {
      const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pair));
      return ptx::max_nan_f32(both.x, both.y);
    } else {
      return ptx::max_nan_f32(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
    }
  }
};

template <>
struct Chunk<float> {
  float4 lo;
  float4 hi;

  __device__ __forceinline__ void load(const float* from) {
    lo = __ldcs(reinterpret_cast<const float4*>(from));
    hi = __ldcs(reinterpret_cast<const float4*>(from) + 1);
  }
  __device__ __forceinline__ void load_cached(const float* from) {
    lo = reinterpret_cast<const float4*>(from)[0];
    hi = reinterpret_cast<const float4*>(from)[1];
  }
  __device__ __forceinline__ void clear() { lo = hi = make_float4(0, 0, 0, 0); }
  template <int kHalf>
  __device__ __forceinline__ void to_float(float (&x)[4]) const {
    const float4& half = kHalf == 0 ? lo : hi;
    x[0] = half.x, x[1] = half.y, x[2] = half.z, x[3] = half.w;
  }
  __device__ __forceinline__ float amax() const {
    float m = 0.0F;
    for (const float4& half : {lo, hi}) {
      m = ptx::max_nan_f32(m, ptx::max_nan_f32(fabsf(half.x), fabsf(half.y)));
      m = ptx::max_nan_f32(m, ptx::max_nan_f32(fabsf(half.z), fabsf(half.w)));
    }
    return m;
  }
  using Amax = float;
  __device__ __forceinline__ void add_to(Amax& m) const { m = ptx::max_nan_f32(m, amax()); }
  static __device__ __forceinline__ float amax_of(Amax m) { return m; }
};

inline constexpr float kMaxFinite = 3.402823466e38F;

// amax / 127, correctly rounded, without a branch: the quotient by the rounded 1/127, and two steps
// that add what is missing (see RowDivision below). A small amax is scaled up by a power of two, so
// that no remainder underflows.
struct AmaxQuotient {
  float amax;  // scaled
  float t;     // scaled: RN(amax / 127)
  bool small;

  static __device__ __forceinline__ AmaxQuotient of(float amax) {
    constexpr float kInverse = 1.0F / static_cast<float>(kQuantMax);
    AmaxQuotient quotient;
    quotient.small = amax < 0x1p-60F;
    quotient.amax = quotient.small ? amax * 0x1p64F : amax;
    quotient.t = __fmul_rn(quotient.amax, kInverse);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      quotient.t = __fmaf_rn(quotient.remainder(), kInverse, quotient.t);
    }
    return quotient;
  }
  // amax - 127 t: exact.
  __device__ __forceinline__ float remainder() const {
    return __fmaf_rn(-t, static_cast<float>(kQuantMax), amax);
  }
  __device__ __forceinline__ float value() const { return small ? t * 0x1p-64F : t; }
};

__device__ __forceinline__ float divide_by_127(float amax) {
  return AmaxQuotient::of(amax).value();
}

// The smallest amax whose RN(amax / 127) is a normal number: the float32 below it, by 2^-23.99 of
// itself, rounds to a subnormal one.
inline constexpr float kMinUsableAmax = kMinNormalScale * static_cast<float>(kQuantMax);

// How a row is quantized, from its amax (NaN if the row holds one).
struct RowScale {
  float stored;   // what the caller gets: amax / 127; 1 where that is no normal number, NaN for a
                  // non-finite row
  float divisor;  // amax / 127; unused where the row becomes zeros
  float inverse;  // RN(1 / divisor), or 0 where the row becomes zeros
  bool finite;

  static __device__ __forceinline__ RowScale from_amax(float amax) {
    const bool usable = amax >= kMinUsableAmax;
    RowScale s;
    s.finite = amax <= kMaxFinite;  // false for NaN as well
    s.divisor = divide_by_127(amax);
    s.inverse = usable ? __frcp_rn(s.divisor) : 0.0F;
    s.stored = !s.finite ? __int_as_float(0x7fc00000) : usable ? s.divisor : 1.0F;
    return s;
  }
};

// One FMA multiplies and rounds: x * inverse + 1.5 * 2^23 has rint(x * inverse), ties to even, in
// its low mantissa bits, as two's complement; the product is not rounded before.
inline constexpr float kRintMagic = 12582912.0F;

// Note [Multiply, then repair]
// rint(RN(x / s)) is wanted, with s = RN(amax / 127); x * (1/s) is cheaper. For float32 take 1/s
// from both sides, `up` and `down`, far enough apart for the roundings of up, of down and of x / s
// itself: then RN(x / s) lies between x * down and x * up, and where these round to one integer so
// does it. Where they do not (about one value in 25,000), the quotient is made exact.
//
// Note [One product for 16-bit rows]
// x and amax have few significant bits, 8 in bfloat16 and 11 in float16, so x / amax is a quotient
// of small integers, and x * 127 / amax is either a half-integer exactly or away from every one by
// 1 / (254 * 2047) of itself (1 / (254 * 255) in bfloat16): more than 2^-20, which is more than s,
// RN(x / s) and an approximate inverse are off together. So any inverse within 2^-20 gives the
// right integer, but for ties. With x = X 2^i and amax = A 2^j, both odd, a tie means that 127 A
// divides into 254 X times a power of two and an odd integer below 255:
//   - that integer is 127: |x| is amax / 2, the same for the whole row. An inverse a little above
//   or
//     below 127 / amax takes the side that RN(x / s) is on, which one remainder tells;
//   - or 127 divides A: s is A / 127 times a power of two, exactly. Where it is a power of two, so
//     is the inverse, and products are exact, as quotients are. Else (float16 alone, one row in
//     150) the row is divided.
template <typename T>
inline constexpr bool kOneProduct = sizeof(T) == 2;

struct RowBounds {
  float up;
  float down;

  // Of an inverse within 2^-23 of 1/s, relatively: 2^-21 covers that, the rounding of the product
  // here and that of x / s, 2^-24 each.
  static __device__ __forceinline__ RowBounds around(float inverse) {
    return {inverse * (1.0F + 0x1p-21F), inverse * (1.0F - 0x1p-21F)};
  }
};

// How a row of T is quantized by products, from its amax.
struct RowFactor {
  float stored;
  float divisor;  // NaN where the row is not finite
  float inverse;  // about 1 / divisor; 0 where the row becomes zeros; negative where it is not
                  // finite, or where products of 16-bit values do not give the integers

  template <typename T>
  static __device__ __forceinline__ RowFactor from_amax(float amax) {
    const bool usable = amax >= kMinUsableAmax;
    const bool finite = amax <= kMaxFinite;
    const AmaxQuotient quotient = AmaxQuotient::of(amax);
    RowFactor f;
    f.divisor = finite ? quotient.value() : __int_as_float(0x7fc00000);
    f.stored = finite && !usable ? 1.0F : f.divisor;
    f.inverse = ptx::rcp_approx(f.divisor);
    if constexpr (kOneProduct<T>) {
      // RN(amax / 2 / s) is 63.5, a tie whose even side is 64, from half an ulp below on.
      const float rest = __fmaf_rn(-63.5F, quotient.t, 0.5F * quotient.amax);
      f.inverse *= rest >= -0x1p-19F * quotient.t ? 1.0F + 0x1p-21F : 1.0F - 0x1p-21F;
      const uint32_t bits = __float_as_uint(f.divisor);
      if ((bits & 0x007fffffu) == 0) {
        f.inverse = __uint_as_float(0x7f000000u - bits);
      } else if (std::is_same_v<T, __half> && quotient.remainder() == 0.0F) {
        f.inverse = -1.0F;
      }
    }
    if (!usable) f.inverse = 0.0F;
    if (!finite) f.inverse = -1.0F;
    return f;
  }
};

// RN(x / s) for a row's x, in a few FMAs and registers where __fdiv_rn is a subroutine.
// t = x * RN(1/s) is within 1.5 ulp; a step t += (x - t s) * RN(1/s) brings it within one, and the
// next one to the correctly rounded quotient (Markstein 1990, theorem 7.2: the reciprocal is
// rounded correctly and the remainder is exact). The remainder must not underflow: a small s is
// scaled up, with x, by a power of two, which leaves the quotient alone. Where s.inverse is 0, so
// is the quotient.
struct RowDivision {
  float boost;
  float divisor;  // boosted
  float inverse;  // of the boosted divisor

  static __device__ __forceinline__ RowDivision by(const RowScale& s) {
    const bool small = s.divisor < 0x1p-64F;
    RowDivision d;
    d.boost = small ? 0x1p64F : 1.0F;
    d.divisor = s.divisor * d.boost;
    d.inverse = small ? s.inverse * 0x1p-64F : s.inverse;
    return d;
  }
  __device__ __forceinline__ float quotient(float x) const {
    const float a = x * boost;
    float t = __fmul_rn(a, inverse);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      t = __fmaf_rn(__fmaf_rn(-t, divisor, a), inverse, t);
    }
    return t;
  }
};

__device__ __forceinline__ float divide_rn(float x, const RowScale& s) {
  return RowDivision::by(s).quotient(x);
}

// The low bytes of four integers.
__device__ __forceinline__ uint32_t pack_x4(const uint32_t (&q)[4]) {
  return __byte_perm(__byte_perm(q[0], q[1], 0x0040), __byte_perm(q[2], q[3], 0x0040), 0x5410);
}

// Four values to four bytes. |q| <= 127 needs no clamp: |x| <= amax and s = RN(amax / 127) keep
// |x / s| below 127.5. `doubt` becomes nonzero where the value must be made exact.
__device__ __forceinline__ uint32_t quantize_x4(const float (&x)[4], const RowBounds& bounds,
                                                uint32_t& doubt) {
  uint32_t q[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    q[i] = __float_as_uint(__fmaf_rn(x[i], bounds.up, kRintMagic));
    doubt |= q[i] ^ __float_as_uint(__fmaf_rn(x[i], bounds.down, kRintMagic));
  }
  return pack_x4(q);
}

__device__ __forceinline__ uint32_t quantize_x4(const float (&x)[4], float inverse) {
  uint32_t q[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) q[i] = __float_as_uint(__fmaf_rn(x[i], inverse, kRintMagic));
  return pack_x4(q);
}

// `doubt` becomes nonzero where the chunk must be divided.
template <typename T>
__device__ __forceinline__ uint2 quantize_chunk(const Chunk<T>& chunk, float inverse,
                                                uint32_t& doubt) {
  float lo[4];
  float hi[4];
  chunk.template to_float<0>(lo);
  chunk.template to_float<1>(hi);
  doubt |= inverse < 0.0F ? 1 : 0;
  if constexpr (kOneProduct<T>) {
    return make_uint2(quantize_x4(lo, inverse), quantize_x4(hi, inverse));
  } else {
    const RowBounds bounds = RowBounds::around(inverse);
    uint2 q;
    q.x = quantize_x4(lo, bounds, doubt);
    q.y = quantize_x4(hi, bounds, doubt);
    return q;
  }
}

template <typename T>
__device__ __forceinline__ uint2 quantize_chunk_by_division(const Chunk<T>& chunk,
                                                            const RowFactor& f) {
  RowScale s;
  s.divisor = f.divisor;
  s.inverse = f.inverse == 0.0F ? 0.0F : __frcp_rn(f.divisor);
  const RowDivision d = RowDivision::by(s);
  float x[8];
  chunk.template to_float<0>(reinterpret_cast<float (&)[4]>(x[0]));
  chunk.template to_float<1>(reinterpret_cast<float (&)[4]>(x[4]));
  uint32_t q[2][4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    q[i / 4][i % 4] = __float_as_uint(__fadd_rn(d.quotient(x[i]), kRintMagic));
  }
  return f.divisor <= kMaxFinite ? make_uint2(pack_x4(q[0]), pack_x4(q[1])) : make_uint2(0, 0);
}

template <typename T>
__device__ __forceinline__ uint2 quantize_chunk(const Chunk<T>& chunk, const RowFactor& f) {
  uint32_t doubt = 0;
  uint2 q = quantize_chunk(chunk, f.inverse, doubt);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    // Only rows that are not finite: zeros.
    return doubt != 0 ? make_uint2(0, 0) : q;
  }
  if (__builtin_expect(doubt != 0, 0)) q = quantize_chunk_by_division(chunk, f);
  return q;
}

__device__ __forceinline__ int8_t quantize_one(float x, const RowScale& s) {
  if (!s.finite || s.inverse == 0.0F) return 0;
  return static_cast<int8_t>(__float2int_rn(divide_rn(x, s)));
}

}  // namespace int8_ops::cuda
