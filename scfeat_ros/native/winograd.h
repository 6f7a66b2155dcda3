// What convolutions by minimal filtering share: the transforms, the matrix product.
//
// F(m x m, r x r) with m + r - 1 = 6 (Lavin and Gray, arXiv 1509.09308): a patch of 6x6 values gives
// a tile of m x m results. Their transforms have 36 places, and at each place, over many tiles, there
// is one product of the inputs' channels with the weights.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bfloat16.h"
#include "call.h"
#include "integers.h"
#include "lanes.h"

namespace {

constexpr int PATCH = 6;

// Rows or columns of a patch to those of its transform: B^T d.
inline void transform_input(const Lanes d[PATCH], Lanes out[PATCH]) {
  const Lanes even = d[4] - 4.0f * d[2], odd = d[3] - 4.0f * d[1];
  const Lanes near = d[4] - d[2], far = 2.0f * (d[3] - d[1]);
  out[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
  out[1] = even + odd;
  out[2] = even - odd;
  out[3] = near + far;
  out[4] = near - far;
  out[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
}

// And back to a tile's rows or columns: A^T m.
template <int TILE>
inline void transform_output(const Lanes m[PATCH], Lanes out[TILE]) {
  const Lanes sum = m[1] + m[2], difference = m[1] - m[2];
  const Lanes sum2 = m[3] + m[4], difference2 = m[3] - m[4];
  out[0] = m[0] + sum + sum2;
  out[1] = difference + 2.0f * difference2;
  out[2] = sum + 4.0f * sum2;
  if constexpr (TILE == 4) out[3] = difference + 8.0f * difference2;
  out[TILE - 1] += m[5];
}

// What a tile's results depend on: rows of PATCH pixels, whose channels lie beside each other.
template <typename T>
struct Patch {
  const T *rows[PATCH];
};

// What the products are of. Transformed patches and weights are kept as `Number`s; a lane of a `Sum`
// takes up PAIR of them at a time. `scale` is what the results of a patch are to be multiplied by.

struct Floats {
  typedef float Number;
  typedef Lanes Sum;
  static constexpr int PAIR = 1;

  template <typename T>
  static float scale(const Patch<T> &, int) { return 1; }

  // Lanes of a transformed patch at place (i, j), brought to its scale by a factor.
  static void put(Number *to, Lanes value, float, int, int) { store(to, value); }

  static Sum repeat(const Number *from) { return Lanes{} + *from; }
  static Sum add(Sum sum, Sum one, Sum weight) { return sum + one * weight; }
  static Lanes finish(Sum sum, const float *) { return sum; }
};

#if defined(HAS_INT16)
// Integers of 16 bits. The largest magnitude in a patch tells how large its transform can be at each
// place, and that is brought to `Weights::largest`, so that no sum overflows 32 bits.
struct Int16 {
  typedef int16_t Number;
  typedef Integers Sum;
  static constexpr int PAIR = 2;

  // The largest magnitude in a patch.
  static float scale(const Patch<float> &patch, int channels) {
    const int count = PATCH * channels;
    Lanes largest{};
    for (const float *row : patch.rows)
      for (int k = 0; k < count; k += LANES) {  // the last vector ends where the row does
        const Lanes size = magnitude(load<Lanes>(row + std::min(k, count - LANES)));
        largest = size > largest ? size : largest;
      }
    return std::max(largest_lane(largest), 1e-30f);
  }

  static float scale(const Patch<bfloat16> &patch, int channels) {
    PairLanes largest{};  // by the bits, which are in the order of the magnitudes
    static_assert(PATCH % 2 == 0);  // and channels are a multiple of LANES: nothing is left
    for (const bfloat16 *row : patch.rows)
      for (int k = 0; k < PATCH * channels; k += 2 * LANES) {
        const PairLanes magnitude = load<PairLanes>(row + k) & 0x7fff;
        largest = magnitude > largest ? magnitude : largest;
      }
    int16_t lanes[2 * LANES], most = 0;
    store(lanes, largest);
    for (int16_t value : lanes) most = std::max(most, value);
    return std::max(read(bfloat16(most)), 1e-30f);
  }

  static void put(Number *to, Lanes value, float factor, int i, int j) {
    // by what the rows of B^T come to at most
    constexpr float share[PATCH] = {1.0f / 10, 1.0f / 10, 1.0f / 10, 1.0f / 6, 1.0f / 6, 1.0f / 10};
    store(to, round_to<Int16Lanes>(value * (share[i] * share[j] * factor)));
  }

  static Sum repeat(const Number *from) { return Integers{} + load<int32_t>(from); }
  static Sum add(Sum sum, Sum one, Sum weight) { return add_products<Number>(sum, one, weight); }
  static Lanes finish(Sum sum, const float *scale) {
    return __builtin_convertvector(sum, Lanes) * load<Lanes>(scale);
  }
};
#endif

// A template for maps of both types, by all products; those of integers are name_int16.
#if defined(HAS_INT16)
#define EXPORT_KINDS(name)                        \
  EXPORT(name##_float, name<float, Floats>)       \
  EXPORT(name##_bfloat16, name<bfloat16, Floats>) \
  EXPORT(name##_int16_float, name<float, Int16>)  \
  EXPORT(name##_int16_bfloat16, name<bfloat16, Int16>)
#else
#define EXPORT_KINDS(name)                  \
  EXPORT(name##_float, name<float, Floats>) \
  EXPORT(name##_bfloat16, name<bfloat16, Floats>)
#endif

// A patch of a number of channels -> a tile of a block, from a channel on; places `pitch` apart.
template <typename Kind, typename T>
void to_places(const Patch<T> &patch, int channels, float factor, long pitch,
               typename Kind::Number *out) {
  for (int c = 0; c < channels; c += LANES) {
    Lanes columns[PATCH][PATCH];
    for (int j = 0; j < PATCH; j++) {
      Lanes d[PATCH];
      for (int i = 0; i < PATCH; i++) d[i] = read_lanes(patch.rows[i] + j * channels + c);
      transform_input(d, columns[j]);
    }
    for (int i = 0; i < PATCH; i++) {
      Lanes d[PATCH], v[PATCH];
      for (int j = 0; j < PATCH; j++) d[j] = columns[j][i];
      transform_input(d, v);
      for (int j = 0; j < PATCH; j++)
        Kind::put(out + (i * PATCH + j) * pitch + c, v[j], factor, i, j);
    }
  }
}

// And back, from the products of a tile: calls use(row, column, channel, lanes) for the results in
// its first rows and columns.
template <int TILE, typename Use>
void from_places(const float *products, int channels, float scale, long pitch, int rows,
                 int columns, Use use) {
  for (int c = 0; c < channels; c += LANES) {
    Lanes half[PATCH][TILE];
    for (int j = 0; j < PATCH; j++) {
      Lanes m[PATCH];
      for (int i = 0; i < PATCH; i++) m[i] = load<Lanes>(products + (i * PATCH + j) * pitch + c);
      transform_output<TILE>(m, half[j]);
    }
    for (int i = 0; i < rows; i++) {
      Lanes m[PATCH], y[TILE];
      for (int j = 0; j < PATCH; j++) m[j] = half[j][i];
      transform_output<TILE>(m, y);
      for (int j = 0; j < columns; j++) use(i, j, c, y[j] * scale);
    }
  }
}

// Register blocks of the matrix product: ROWS tiles by VECTORS of their results. What is left of the
// tiles is taken by REST at a time.
constexpr int ROWS = LANES == 16 ? 12 : REGISTERS == 32 ? 8 : 6;
constexpr int REST = LANES == 16 ? 4 : 2;

// (TILES, inputs) times (inputs, VECTORS * LANES) -> as many columns of (TILES, outputs).
template <typename Kind, int TILES, int VECTORS>
void multiply_few(const typename Kind::Number *a, int inputs, const typename Kind::Number *weight,
                  const float *scale, float *out, int outputs) {
  constexpr int PAIR = Kind::PAIR;
  typedef typename Kind::Sum Sum;
  Sum sum[TILES][VECTORS] = {};
  for (int k = 0; k < inputs; k += PAIR) {
    Sum w[VECTORS];
    for (int v = 0; v < VECTORS; v++) w[v] = load<Sum>(weight + (k * VECTORS + v * PAIR) * LANES);
    for (int r = 0; r < TILES; r++) {
      const Sum one = Kind::repeat(a + r * inputs + k);
      for (int v = 0; v < VECTORS; v++) sum[r][v] = Kind::add(sum[r][v], one, w[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < TILES; r++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++)
      store(out + long(r) * outputs + v * LANES, Kind::finish(sum[r][v], scale + v * LANES));
}

// The same for `count` tiles.
template <typename Kind, int VECTORS>
void multiply(const typename Kind::Number *a, int count, int inputs,
              const typename Kind::Number *weight, const float *scale, float *out, int outputs) {
  int row = 0;
  for (; row + ROWS <= count; row += ROWS)
    multiply_few<Kind, ROWS, VECTORS>(a + long(row) * inputs, inputs, weight, scale,
                                      out + long(row) * outputs, outputs);
  for (; row < count; row += REST)
    multiply_few<Kind, REST, VECTORS>(a + long(row) * inputs, inputs, weight, scale,
                                      out + long(row) * outputs, outputs);
}

// Columns of results that a panel of weights holds.
inline int panel_columns(int outputs) { return outputs % (2 * LANES) ? LANES : 2 * LANES; }

// Transformed weights: (36, panels, inputs / PAIR, columns, PAIR). Where numbers are rounded: the
// scale of each place and output, (36, outputs), and the largest number that a patch may have.
template <typename Kind>
struct Weights {
  const typename Kind::Number *values;
  const float *scales;
  float largest;
};

// The products of a block of tiles at all places.
//
// places: (36, tiles, inputs), `pitch_in` numbers from one place to the next; products: (36, tiles,
// outputs), `pitch_out` apart, each to be multiplied by its tile's scale. Both blocks have room for a
// multiple of REST tiles.
template <typename Kind>
void multiply_places(const typename Kind::Number *places, long pitch_in, int count, int inputs,
                     Weights<Kind> weights, int outputs, float *products, long pitch_out) {
  const int columns = panel_columns(outputs);
  const auto product = columns == LANES ? multiply<Kind, 1> : multiply<Kind, 2>;
  for (int place = 0; place < PATCH * PATCH; place++)
    for (int column = 0; column < outputs; column += columns) {
      const long before = long(place) * outputs + column;
      product(places + place * pitch_in, count, inputs, weights.values + before * inputs,
              weights.scales ? weights.scales + before : nullptr,
              products + place * pitch_out + column, outputs);
    }
}

}  // namespace
