// Sums of products of integers of 16 and 8 bits, which many CPUs find faster than those of floats.
#pragma once

#include <cstdint>

#include "lanes.h"

// Of CPUs with vectors of 512 bits only those with AVX512-VNNI gain by it.
#if defined(__AVX512VNNI__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define HAS_INT16
#include <immintrin.h>
#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define HAS_INT8
#elif defined(__ARM_FEATURE_DOTPROD)
#define HAS_INT8
#include <arm_neon.h>
#endif

namespace {

// Values to nearest, as integers of so few bits that their magnitudes are below 2^22.
template <typename V>
inline V round_to(Lanes value) {
  const Lanes shifted = value + TO_WHOLE;
  return __builtin_convertvector(load<Integers>(&shifted), V);
}

// sum + the products of numbers, of which every lane of `one` and `other` holds as many as it can.
template <typename Number>
Integers add_products(Integers sum, Integers one, Integers other);

// What is to be added to the numbers in `other`: some CPUs take only positive ones there.
template <typename Number>
constexpr int OFFSET = 0;

#if defined(HAS_INT16)
typedef int16_t Int16Lanes __attribute__((vector_size(LANES * sizeof(int16_t))));

// As many as fill a register.
typedef int16_t PairLanes __attribute__((vector_size(2 * LANES * sizeof(int16_t))));

template <>
inline Integers add_products<int16_t>(Integers sum, Integers one, Integers other) {
#if defined(__AVX512VNNI__)
  return Integers(_mm512_dpwssd_epi32(__m512i(sum), __m512i(one), __m512i(other)));
#elif defined(__AVXVNNI__)
  return Integers(_mm256_dpwssd_avx_epi32(__m256i(sum), __m256i(one), __m256i(other)));
#else
  return sum + Integers(_mm256_madd_epi16(__m256i(one), __m256i(other)));
#endif
}
#endif

#if defined(HAS_INT8)
#if !defined(__ARM_FEATURE_DOTPROD)
template <>
constexpr int OFFSET<int8_t> = 128;
#endif

template <>
inline Integers add_products<int8_t>(Integers sum, Integers one, Integers other) {
#if defined(__AVX512VNNI__)
  return Integers(_mm512_dpbusd_epi32(__m512i(sum), __m512i(other), __m512i(one)));
#elif defined(__AVXVNNI__)
  return Integers(_mm256_dpbusd_avx_epi32(__m256i(sum), __m256i(other), __m256i(one)));
#else
  return Integers(vdotq_s32(int32x4_t(sum), int8x16_t(one), int8x16_t(other)));
#endif
}
#endif

}  // namespace
