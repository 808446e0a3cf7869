// Vector ops of AVX2 with F16C and FMA, as the simd_*.h drivers want them.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace int8_ops::cpu {
namespace {

struct Avx2 {
  using Int = __m256i;
  using Float = __m256;
  static constexpr int kLanes = 8;

  // ---- int8 dot products ----
  // On int16: vpmaddubsw, which takes bytes, saturates its sums of two products.
  static constexpr int kGroup = 2;
  static constexpr int kChunk = 16;
  static constexpr int kWeightOffset = 0;
  // 6 x 2 accumulators, 2 vectors of w, a broadcast of a and a product fill the 16 registers.
  static constexpr int kTileRows = 6;
  static constexpr int kTileMinRows = 3;
  static constexpr int kTileCols = 16;
  static constexpr int kDotRows = 2;
  static constexpr int kDotColsOneRow = 4;
  static constexpr int kDotMaxRows = 6;
  // The float tile of weights times latents: 6 x 2 sums, 2 vectors of latents and a broadcast.
  static constexpr int kMixRows = 6;
  static constexpr int kMixVectors = 2;

  static Int zero() { return _mm256_setzero_si256(); }
  static Int broadcast_int(int32_t x) { return _mm256_set1_epi32(x); }
  static Int broadcast_group(const void* from) {
    int32_t x;
    __builtin_memcpy(&x, from, sizeof x);
    return _mm256_set1_epi32(x);
  }
  static Int load_ints(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  static void store_ints(void* to, Int x) { _mm256_storeu_si256(static_cast<__m256i*>(to), x); }
  static Int operand(const int8_t* from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  // Values [at, k) of a row, fewer than kChunk; the rest is 0.
  static Int operand_tail(const int8_t* row, int64_t at, int64_t k) {
    const int64_t count = k - at;
    if (at == 0) {
      int8_t buffer[kChunk] = {};
      __builtin_memcpy(buffer, row, count);
      return operand(buffer);
    }
    // The last kChunk bytes of the row, shifted down to the `count` that are wanted: a shuffle
    // index with its top bit set gives 0.
    alignas(16) static constexpr int8_t kIndices[2 * kChunk] = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
        -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    const auto load = [](const int8_t* from) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    };
    return _mm256_cvtepi8_epi16(
        _mm_shuffle_epi8(load(row + k - kChunk), load(kIndices + kChunk - count)));
  }
  static Int as_weights(Int x) { return x; }
  static Int dot(Int acc, Int w, Int a) { return _mm256_add_epi32(acc, _mm256_madd_epi16(w, a)); }

  static void store_four_sums(int32_t* to, Int a, Int b, Int c, Int d, int32_t start) {
    const __m256i sums = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    const __m128i four =
        _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_add_epi32(four, _mm_set1_epi32(start)));
  }

  // 8 x 8 lanes of 4 bytes: pairs, quadruples, then halves change places.
  static void transpose(Int (&t)[8]) {
    Int u[8];
    for (int i = 0; i < 8; i += 2) {
      u[i] = _mm256_unpacklo_epi32(t[i], t[i + 1]);
      u[i + 1] = _mm256_unpackhi_epi32(t[i], t[i + 1]);
    }
    // t[4 * g + c]: column c of each half, rows 4 * g .. 4 * g + 3.
    for (int g = 0; g < 8; g += 4) {
      t[g] = _mm256_unpacklo_epi64(u[g], u[g + 2]);
      t[g + 1] = _mm256_unpackhi_epi64(u[g], u[g + 2]);
      t[g + 2] = _mm256_unpacklo_epi64(u[g + 1], u[g + 3]);
      t[g + 3] = _mm256_unpackhi_epi64(u[g + 1], u[g + 3]);
    }
    for (int c = 0; c < 4; ++c) {
      u[c] = _mm256_permute2x128_si256(t[c], t[4 + c], 0x20);
      u[4 + c] = _mm256_permute2x128_si256(t[c], t[4 + c], 0x31);
    }
    for (int i = 0; i < 8; ++i) t[i] = u[i];
  }

  // ---- float32 ----
  static Float zero_float() { return _mm256_setzero_ps(); }
  static Float broadcast(float x) { return _mm256_set1_ps(x); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
  // a * b + c, rounded once.
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  // b where either is NaN.
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  // 2 to the power of a whole number from -126 to 127.
  static Float power_of_two(Float whole) {
    const Int biased = _mm256_add_epi32(to_int(whole), broadcast_int(127));
    return bits_to_float(_mm256_slli_epi32(biased, 23));
  }
  static Float round(Float x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Int to_int(Float integer) { return _mm256_cvttps_epi32(integer); }
  static Float to_float(Int x) { return _mm256_cvtepi32_ps(x); }
  static float first_lane(Float x) { return _mm256_cvtss_f32(x); }
  // Always in the same order.
  static float sum_of_lanes(Float x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  static Float bits_to_float(Int x) { return _mm256_castsi256_ps(x); }
  static Int float_bits(Float x) { return _mm256_castps_si256(x); }
  static Int magnitude_bits(Float x) {
    return _mm256_and_si256(float_bits(x), _mm256_set1_epi32(0x7fffffff));
  }
  static Int max_int(Int a, Int b) { return _mm256_max_epi32(a, b); }
  static int32_t horizontal_max(Int x) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
    return _mm_cvtsi128_si32(m);
  }
  // x < bound ? yes : no
  static Float select_less(Float x, Float bound, Float yes, Float no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, bound, _CMP_LT_OQ));
  }
  static Float nan_where_at_least(Int bits, int32_t bound, Float x) {
    const Float low = bits_to_float(_mm256_cmpgt_epi32(broadcast_int(bound), bits));
    return _mm256_blendv_ps(bits_to_float(broadcast_int(0x7fc00000)), x, low);
  }
  static Int zero_where_nan(Int x, Float test) {
    return _mm256_and_si256(x, float_bits(_mm256_cmp_ps(test, test, _CMP_ORD_Q)));
  }
  static bool any_magnitude_above(Float x, Float bound) {
    const Float magnitude = bits_to_float(magnitude_bits(x));
    return _mm256_movemask_ps(_mm256_cmp_ps(magnitude, bound, _CMP_GT_OQ)) != 0;
  }

  // ---- memory ----
  static Float load_float32(const void* from) {
    return _mm256_loadu_ps(static_cast<const float*>(from));
  }
  static Float load_float16(const void* from) { return _mm256_cvtph_ps(load_half(from)); }
  static Float load_bfloat16(const void* from) {
    return bits_to_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(from)), 16));
  }
  static Float load_int8(const int8_t* from) {
    return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  static void store_float32(void* to, Float x) { _mm256_storeu_ps(static_cast<float*>(to), x); }
  static void store_float16(void* to, Float x) {
    store_half(to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store_bfloat16(void* to, Float x) {
    const Int bits = float_bits(x);
    const Int odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), broadcast_int(1));
    const Int rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, broadcast_int(0x7fff)));
    const Float high = bits_to_float(_mm256_srli_epi32(rounded, 16));
    const Int out = float_bits(_mm256_blendv_ps(bits_to_float(broadcast_int(0x7fc0)), high,
                                                _mm256_cmp_ps(x, x, _CMP_ORD_Q)));
    store_half(to, _mm_packus_epi32(_mm256_castsi256_si128(out), _mm256_extracti128_si256(out, 1)));
  }
  // Lanes within int8.
  static void store_int8(int8_t* to, Int x) {
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
  }

 private:
  static __m128i load_half(const void* from) {
    return _mm_loadu_si128(static_cast<const __m128i*>(from));
  }
  static void store_half(void* to, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(to), x); }
};

}  // namespace
}  // namespace int8_ops::cpu
