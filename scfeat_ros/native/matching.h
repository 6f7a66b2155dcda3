// Two sets of descriptors, and their inner products.
#pragma once

#include <algorithm>
#include <cstddef>

#include "bfloat16.h"

namespace {

// Of sums of products at a time: so many fill the registers.
constexpr int BLOCK_ROWS = REGISTERS == 32 ? 8 : 4, BLOCK_VECTORS = REGISTERS == 32 ? 3 : 2;
constexpr int BLOCK_COLUMNS = LANES * BLOCK_VECTORS;

constexpr float LEAST = -1e30f;  // below every similarity

inline int parts(int count, int size) { return (count + size - 1) / size; }

struct Matrix {
  const float *values;
  int rows, length;

  // what lies beyond the end repeats the last row
  const float *row(int i) const { return values + size_t(std::min(i, rows - 1)) * length; }
};

// The largest of similarities, of equal ones the one with the smallest place, and the second largest.
struct Nearest {
  float first = LEAST, second = LEAST;
  int place = 0;

  // `next`: one that is smaller, of the same origin.
  void take(float value, int at, float next = LEAST) {
    const bool nearer = value > first || (value == first && at < place);
    second = std::max({second, next, nearer ? first : value});
    if (!nearer) return;
    first = value;
    place = at;
  }
};

inline float product(Matrix a, int i, Matrix b, int j) {
  const float *one = a.row(i), *other = b.row(j);
  Lanes sum{};
  by_lanes(a.length, [&](int k, auto lanes) { sum += lanes.read(one + k) * lanes.read(other + k); });
  return sum_of_lanes(sum);
}

}  // namespace
