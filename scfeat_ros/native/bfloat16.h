// Numbers in 16 bits, and maps read and written alike in fp32 and bf16.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "lanes.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

enum class bfloat16 : uint16_t {};  // a type of its own, and still a number to the vectorizer

inline float read(float x) { return x; }

inline float read(bfloat16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void write(float &to, float value) { to = value; }

inline void write(bfloat16 &to, float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to = bfloat16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

typedef uint16_t HalfLanes __attribute__((vector_size(LANES * sizeof(uint16_t))));
typedef uint32_t WordLanes __attribute__((vector_size(LANES * sizeof(uint32_t))));

inline Lanes read_lanes(const float *from) { return load<Lanes>(from); }

inline Lanes read_lanes(const bfloat16 *from) {
#if defined(__AVX512F__)  // the compiler would make two halves of it
  const WordLanes words = WordLanes(_mm512_cvtepu16_epi32(load<__m256i>(from)));
#else
  const WordLanes words = __builtin_convertvector(load<HalfLanes>(from), WordLanes);
#endif
  const WordLanes bits = words << 16;
  return load<Lanes>(&bits);
}

inline void write_lanes(float *to, Lanes value) { store(to, value); }

inline void write_lanes(bfloat16 *to, Lanes value) {  // rounded as by `write`
#if defined(__AVX512BF16__)
  store(to, _mm512_cvtneps_pbh(value));
#else
  const WordLanes bits = load<WordLanes>(&value);
  store(to, __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, HalfLanes));
#endif
}

// Vectors of numbers in memory, and what is left at their end.

struct Whole {
  static constexpr int count = LANES;

  template <typename T>
  static Lanes read(const T *from) { return read_lanes(from); }
  template <typename T>
  static void write(T *to, Lanes value) { write_lanes(to, value); }
  static Lanes only(Lanes value) { return value; }
};

struct Part {
  int count;

  template <typename T>
  Lanes read(const T *from) const {
    T values[LANES] = {};
    std::copy_n(from, count, values);
    return read_lanes(values);
  }
  template <typename T>
  void write(T *to, Lanes value) const {
    T values[LANES];
    write_lanes(values, value);
    std::copy_n(values, count, to);
  }
  // The values, and zeros behind them.
  Lanes only(Lanes value) const {
    Lanes kept{};
    write(reinterpret_cast<float *>(&kept), value);
    return kept;
  }
};

// Calls use(k, lanes) for some numbers, from `k` on as many as `lanes` reads and writes.
template <typename Use>
inline void by_lanes(long count, Use use) {
  long k = 0;
  for (; k + LANES <= count; k += LANES) use(k, Whole{});
  if (k < count) use(k, Part{int(count - k)});
}

}  // namespace
