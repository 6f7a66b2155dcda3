// Sums of products of integers of 16 bits, in half of the time of floats.
#pragma once

#include <cstdint>

#include "lanes.h"

#if defined(__AVX512VNNI__)
#define HAS_SHORTS
#include <immintrin.h>
#endif

namespace {

typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));

#if defined(HAS_SHORTS)
typedef int16_t ShortLanes __attribute__((vector_size(LANES * sizeof(int16_t))));

// Values, of magnitudes below 2^15, to nearest.
inline ShortLanes round_to_shorts(Lanes value) {
  const Lanes shifted = value + 12582912.0f;  // 1.5 * 2^23, whose last bits are zero
  return __builtin_convertvector(load<Integers>(&shifted), ShortLanes);
}

// sum + the products of pairs, every lane of `one` and `other` holding two numbers.
inline Integers add_products(Integers sum, Integers one, Integers other) {
  return Integers(_mm512_dpwssd_epi32(__m512i(sum), __m512i(one), __m512i(other)));
}
#endif

}  // namespace
