// Sums of products of integers of 16 bits, which many CPUs find faster than those of floats.
#pragma once

#include <cstdint>

#include "lanes.h"

// Of CPUs with vectors of 512 bits only those with AVX512-VNNI gain by it.
#if defined(__AVX512VNNI__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define HAS_SHORTS
#include <immintrin.h>
#endif

namespace {

typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));

#if defined(HAS_SHORTS)
typedef int16_t ShortLanes __attribute__((vector_size(LANES * sizeof(int16_t))));

// As many as fill a register.
typedef int16_t PairLanes __attribute__((vector_size(2 * LANES * sizeof(int16_t))));

// Values, of magnitudes below 2^15, to nearest.
inline ShortLanes round_to_shorts(Lanes value) {
  const Lanes shifted = value + 12582912.0f;  // 1.5 * 2^23, whose last bits are zero
  return __builtin_convertvector(load<Integers>(&shifted), ShortLanes);
}

// sum + the products of pairs, every lane of `one` and `other` holding two numbers.
inline Integers add_products(Integers sum, Integers one, Integers other) {
#if defined(__AVX512VNNI__)
  return Integers(_mm512_dpwssd_epi32(__m512i(sum), __m512i(one), __m512i(other)));
#elif defined(__AVXVNNI__)
  return Integers(_mm256_dpwssd_avx_epi32(__m256i(sum), __m256i(one), __m256i(other)));
#else
  return sum + Integers(_mm256_madd_epi16(__m256i(one), __m256i(other)));
#endif
}
#endif

}  // namespace
