// The few things that differ between instruction sets: a vector of floats, a dot product of bytes, and the filter
// step of the resampling. Everything else is written once, with the compiler's vector types.
#pragma once

#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 16, kTileVectors = 1;  // 16 of 32 registers are sums; a broadcast operand is free
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 of 16 registers
#elif defined(__ARM_NEON)
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 8, kTileVectors = 3;  // 24 of 32 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 6, kTileVectors = 2;
#endif

constexpr int kLanes = kVectorBytes / 4;        // floats of a vector
constexpr int kPanel = kLanes * kTileVectors;   // bank rows of a panel

typedef float F __attribute__((vector_size(kVectorBytes)));
typedef int32_t I __attribute__((vector_size(kVectorBytes)));
typedef uint32_t U __attribute__((vector_size(kVectorBytes)));

inline F load(const float* p) {
  F v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline I load(const int32_t* p) {
  I v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, F v) { memcpy(p, &v, sizeof v); }
inline void store(int32_t* p, I v) { memcpy(p, &v, sizeof v); }
inline F fill(float x) { return x - F{}; }
inline I fill(int32_t x) { return x - I{}; }
inline F to_float(I v) { return __builtin_convertvector(v, F); }

inline F multiply_add(F a, F b, F c) {
#if defined(__AVX512F__)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// -- dot products of bytes: a query's int8 group against a panel's ---------------------------------------------------

#if defined(__AVX512VNNI__)
// vpdpbusd multiplies unsigned with signed bytes: queries are stored plus 128, sums start at -128 × the row's sum.
constexpr int kGroup = 4, kOffset = 128;
typedef uint8_t Query;
typedef int8_t BankVector __attribute__((vector_size(64)));
inline I dot(I sum, int32_t query, BankVector bank) {
  return (I)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(query), (__m512i)bank);
}
#elif defined(__AVX512BW__)
constexpr int kGroup = 2, kOffset = 0;
typedef int16_t Query;
typedef int8_t BankVector __attribute__((vector_size(32)));
inline I dot(I sum, int32_t query, BankVector bank) {
  return sum + (I)_mm512_madd_epi16(_mm512_cvtepi8_epi16((__m256i)bank), _mm512_set1_epi32(query));
}
#elif defined(__AVX2__)
constexpr int kGroup = 2, kOffset = 0;
typedef int16_t Query;
typedef int8_t BankVector __attribute__((vector_size(16)));
inline I dot(I sum, int32_t query, BankVector bank) {
  return sum + (I)_mm256_madd_epi16(_mm256_cvtepi8_epi16((__m128i)bank), _mm256_set1_epi32(query));
}
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int kGroup = 4, kOffset = 0;
typedef int8_t Query;
typedef int8_t BankVector __attribute__((vector_size(16)));
inline I dot(I sum, int32_t query, BankVector bank) {
  return (I)vdotq_s32((int32x4_t)sum, (int8x16_t)bank, vreinterpretq_s8_s32(vdupq_n_s32(query)));
}
#elif defined(__ARM_NEON)
constexpr int kGroup = 2, kOffset = 0;
typedef int8_t Query;  // two of them in 16 bits, repeated
typedef int8_t BankVector __attribute__((vector_size(8)));
inline I dot(I sum, int32_t query, BankVector bank) {
  const int8x8_t pair = vreinterpret_s8_s16(vdup_n_s16((int16_t)query));
  return (I)vpadalq_s16((int32x4_t)sum, vmull_s8((int8x8_t)bank, pair));
}
#else
constexpr int kGroup = 2, kOffset = 0;
typedef int16_t Query;
typedef int8_t BankVector __attribute__((vector_size(8)));
inline I dot(I sum, int32_t query, BankVector bank) {
  const int32_t low = (int16_t)(query & 0xffff), high = query >> 16;
  for (int lane = 0; lane < kLanes; ++lane) sum[lane] += low * bank[2 * lane] + high * bank[2 * lane + 1];
  return sum;
}
#endif
constexpr int kQueryBytes = kGroup * (int)sizeof(Query);  // of one step
static_assert(kQueryBytes <= 4 && sizeof(BankVector) == (size_t)(kGroup * kLanes), "");

inline int32_t load_query(const Query* p) {
  int32_t bits = 0;
  memcpy(&bits, p, kQueryBytes);
  return bits;
}

// -- halves ------------------------------------------------------------------------------------------------------------

// float16 → float32, exact for every value (NaN stays NaN), by arithmetic that compilers turn into vectors.
inline float half_to_float(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = (uint32_t)(half & 0x7fff) << 13;
  uint32_t bits = magnitude + (112u << 23);
  bits += magnitude >= (0x7c00u << 13) ? (112u << 23) : 0;  // infinity and NaN
  const uint32_t small_bits = magnitude + (113u << 23);
  float small, value;
  memcpy(&small, &small_bits, 4);
  small -= 6.103515625e-05f;  // subnormal: exact
  memcpy(&value, &bits, 4);
  value = magnitude < (0x0400u << 13) ? small : value;
  memcpy(&bits, &value, 4);
  bits |= sign;
  memcpy(&value, &bits, 4);
  return value;
}

inline void halves_to_floats(const uint8_t* halves, float* out, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(halves + 2 * i))));
#elif defined(__AVX2__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(halves + 2 * i))));
#elif defined(__ARM_NEON)
  for (; i + 4 <= count; i += 4)
    vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(halves + 2 * i))));
#endif
  for (; i < count; ++i) {
    uint16_t half;
    memcpy(&half, halves + 2 * i, 2);
    out[i] = half_to_float(half);
  }
}

}  // namespace
