// Vectors of as many floats as a register of this CPU holds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

namespace {

// Vectors that are wider than the registers would be kept in memory.
#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));

// From and to any address.
template <typename V, typename T>
inline V load(const T *from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename V, typename T>
inline void store(T *to, V value) {
  std::memcpy(to, &value, sizeof value);
}

// One of all lanes: of halves, of their halves, and so on.
template <typename Join>
inline float join_lanes(Lanes value, Join join) {
  float lanes[LANES];
  store(lanes, value);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int k = 0; k < half; k++) lanes[k] = join(lanes[k], lanes[k + half]);
  return lanes[0];
}

inline float largest_lane(Lanes value) {
  return join_lanes(value, [](float a, float b) { return a > b ? a : b; });
}

inline float sum_of_lanes(Lanes value) {
  return join_lanes(value, [](float a, float b) { return a + b; });
}

inline Lanes magnitude(Lanes value) {
  const Lanes other = -value;
  return value > other ? value : other;
}

// 1.5 * 2^23: a number of a magnitude below 2^22 plus it is whole, and its last bits are the number's.
constexpr float TO_WHOLE = 12582912.0f;

// Numbers that are not set to zero first.
template <typename T>
std::unique_ptr<T[]> space(size_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

}  // namespace
