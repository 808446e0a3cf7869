// Vector ops of AVX-512 (F, BW, DQ, VL) with VNNI, as the simd_*.h drivers want them.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace int8_ops::cpu {
namespace {

struct Avx512Vnni {
  using Int = __m512i;
  using Float = __m512;
  static constexpr int kLanes = 16;

  // ---- int8 dot products ----
  // vpdpbusd multiplies unsigned by signed bytes: weights become w + 128, see start_value().
  static constexpr int kGroup = 4;
  static constexpr int kChunk = 64;
  static constexpr int kWeightOffset = 128;
  // 12 x 2 accumulators, 2 vectors of w and a broadcast of a fill 27 of 32 registers; 24
  // independent chains cover vpdpbusd's latency of 4 or 5.
  static constexpr int kTileRows = 12;
  static constexpr int kTileMinRows = 6;
  static constexpr int kTileCols = 32;
  static constexpr int kDotRows = 4;
  static constexpr int kDotColsOneRow = 8;
  static constexpr int kDotMaxRows = 12;
  // The float tile of weights times latents: 6 x 4 sums, 4 vectors of latents and a broadcast.
  static constexpr int kMixRows = 6;
  static constexpr int kMixVectors = 4;

  static Int zero() { return _mm512_setzero_si512(); }
  static Int broadcast_int(int32_t x) { return _mm512_set1_epi32(x); }
  static Int broadcast_group(const void* from) { return _mm512_set1_epi32(load_int32(from)); }
  static Int load_ints(const void* from) { return _mm512_loadu_si512(from); }
  static void store_ints(void* to, Int x) { _mm512_storeu_si512(to, x); }
  static Int operand(const int8_t* from) { return _mm512_loadu_si512(from); }
  // Values [at, k) of a row, fewer than kChunk; the rest is 0.
  static Int operand_tail(const int8_t* row, int64_t at, int64_t k) {
    return _mm512_maskz_loadu_epi8((uint64_t{1} << (k - at)) - 1, row + at);
  }
  static Int as_weights(Int x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }
  static Int unit_weights() { return _mm512_set1_epi8(1); }
  static Int dot(Int acc, Int w, Int a) { return _mm512_dpbusd_epi32(acc, w, a); }

  static int32_t horizontal_sum(Int x) { return _mm512_reduce_add_epi32(x); }
  static void store_four_sums(int32_t* to, Int a, Int b, Int c, Int d, int32_t start) {
    const __m256i ab = _mm256_hadd_epi32(halves(a), halves(b));
    const __m256i cd = _mm256_hadd_epi32(halves(c), halves(d));
    const __m256i sums = _mm256_hadd_epi32(ab, cd);
    const __m128i four =
        _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_add_epi32(four, _mm_set1_epi32(start)));
  }

  // 16 x 16 lanes of 4 bytes: pairs, quadruples, then 128-bit quarters change places.
  static void transpose(Int (&t)[16]) {
    Int u[16];
    for (int i = 0; i < 16; i += 2) {
      u[i] = _mm512_unpacklo_epi32(t[i], t[i + 1]);
      u[i + 1] = _mm512_unpackhi_epi32(t[i], t[i + 1]);
    }
    // t[4 * g + c]: column c of every quarter, rows 4 * g .. 4 * g + 3.
    for (int g = 0; g < 16; g += 4) {
      t[g] = _mm512_unpacklo_epi64(u[g], u[g + 2]);
      t[g + 1] = _mm512_unpackhi_epi64(u[g], u[g + 2]);
      t[g + 2] = _mm512_unpacklo_epi64(u[g + 1], u[g + 3]);
      t[g + 3] = _mm512_unpackhi_epi64(u[g + 1], u[g + 3]);
    }
    for (int c = 0; c < 4; ++c) {
      u[c] = _mm512_shuffle_i32x4(t[c], t[4 + c], 0x88);
      u[4 + c] = _mm512_shuffle_i32x4(t[c], t[4 + c], 0xdd);
      u[8 + c] = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0x88);
      u[12 + c] = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0xdd);
    }
    for (int c = 0; c < 4; ++c) {
      t[c] = _mm512_shuffle_i32x4(u[c], u[8 + c], 0x88);
      t[4 + c] = _mm512_shuffle_i32x4(u[4 + c], u[12 + c], 0x88);
      t[8 + c] = _mm512_shuffle_i32x4(u[c], u[8 + c], 0xdd);
      t[12 + c] = _mm512_shuffle_i32x4(u[4 + c], u[12 + c], 0xdd);
    }
  }

  // ---- float32 ----
  static Float zero_float() { return _mm512_setzero_ps(); }
  static Float broadcast(float x) { return _mm512_set1_ps(x); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
  // a * b + c, rounded once.
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  // b where either is NaN.
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  // 2 to the power of a whole number from -126 to 127.
  static Float power_of_two(Float whole) { return _mm512_scalef_ps(_mm512_set1_ps(1.0F), whole); }
  static Float round(Float x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Int to_int(Float integer) { return _mm512_cvttps_epi32(integer); }
  static Float to_float(Int x) { return _mm512_cvtepi32_ps(x); }
  static float first_lane(Float x) { return _mm512_cvtss_f32(x); }
  // Always in the same order.
  static float sum_of_lanes(Float x) { return _mm512_reduce_add_ps(x); }
  static Float bits_to_float(Int x) { return _mm512_castsi512_ps(x); }
  static Int float_bits(Float x) { return _mm512_castps_si512(x); }
  static Int magnitude_bits(Float x) {
    return _mm512_and_si512(float_bits(x), _mm512_set1_epi32(0x7fffffff));
  }
  static Int max_int(Int a, Int b) { return _mm512_max_epi32(a, b); }
  static int32_t horizontal_max(Int x) { return _mm512_reduce_max_epi32(x); }
  // x < bound ? yes : no
  static Float select_less(Float x, Float bound, Float yes, Float no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, bound, _CMP_LT_OQ), no, yes);
  }
  static Float nan_where_at_least(Int bits, int32_t bound, Float x) {
    const __mmask16 low = _mm512_cmplt_epi32_mask(bits, broadcast_int(bound));
    return _mm512_mask_blend_ps(low, bits_to_float(broadcast_int(0x7fc00000)), x);
  }
  static Int zero_where_nan(Int x, Float test) {
    return _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(test, test, _CMP_ORD_Q), x);
  }
  static bool any_magnitude_above(Float x, Float bound) {
    return _mm512_cmp_ps_mask(_mm512_abs_ps(x), bound, _CMP_GT_OQ) != 0;
  }

  // ---- memory ----
  static Float load_float32(const void* from) { return _mm512_loadu_ps(from); }
  static Float load_float16(const void* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
  }
  static Float load_bfloat16(const void* from) {
    const __m256i bits = _mm256_loadu_si256(static_cast<const __m256i*>(from));
    return bits_to_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Float load_int8(const int8_t* from) {
    return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static void store_float32(void* to, Float x) { _mm512_storeu_ps(to, x); }
  static void store_float16(void* to, Float x) {
    _mm256_storeu_si256(static_cast<__m256i*>(to),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // Not vcvtneps2bf16: that one flushes subnormals.
  static void store_bfloat16(void* to, Float x) {
    const Int bits = float_bits(x);
    const Int odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), broadcast_int(1));
    const Int rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, broadcast_int(0x7fff)));
    const Int high = _mm512_srli_epi32(rounded, 16);
    const Int out =
        _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_ORD_Q), broadcast_int(0x7fc0), high);
    _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16(out));
  }
  // Lanes within int8.
  static void store_int8(int8_t* to, Int x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(x));
  }

 private:
  static int32_t load_int32(const void* from) {
    int32_t x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
  }
  static __m256i halves(Int x) {
    return _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
  }
};

}  // namespace
}  // namespace int8_ops::cpu
