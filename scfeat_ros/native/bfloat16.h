// Numbers in 16 bits, and maps read and written alike in fp32 and bf16.
#pragma once

#include <cstdint>
#include <cstring>

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

}  // namespace
