// Vectors of as many floats as a register of this CPU holds.
#pragma once

#include <cstring>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));

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

}  // namespace
