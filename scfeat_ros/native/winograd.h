// What convolutions by minimal filtering share: the transform of their input, the matrix product.
//
// F(m x m, r x r) with m + r - 1 = 6 (Lavin and Gray, arXiv 1509.09308): a patch of 6x6 values gives
// a tile of m x m results. Their transforms have 36 places, and at each place, over many tiles, there
// is one product of the inputs' channels with the weights.
#pragma once

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

// Register blocks of the matrix product: ROWS tiles by VECTORS of their results. What is left of the
// tiles is taken by REST at a time.
constexpr int ROWS = LANES == 16 ? 12 : REGISTERS == 32 ? 8 : 6;
constexpr int REST = LANES == 16 ? 4 : 2;

// (TILES, inputs) times (inputs, VECTORS * LANES) -> as many columns of (TILES, outputs).
template <int TILES, int VECTORS>
void multiply_few(const float *a, int inputs, const float *weight, float *out, int outputs) {
  Lanes sum[TILES][VECTORS] = {};
  for (int k = 0; k < inputs; k++) {
    Lanes w[VECTORS];
    for (int v = 0; v < VECTORS; v++) w[v] = load<Lanes>(weight + (k * VECTORS + v) * LANES);
    for (int r = 0; r < TILES; r++)
      for (int v = 0; v < VECTORS; v++) sum[r][v] += a[r * inputs + k] * w[v];
  }
  for (int r = 0; r < TILES; r++)
    for (int v = 0; v < VECTORS; v++) store(out + long(r) * outputs + v * LANES, sum[r][v]);
}

// The same for `count` tiles.
template <int VECTORS>
void multiply(const float *a, int count, int inputs, const float *weight, float *out, int outputs) {
  int row = 0;
  for (; row + ROWS <= count; row += ROWS)
    multiply_few<ROWS, VECTORS>(a + long(row) * inputs, inputs, weight, out + long(row) * outputs,
                                outputs);
  for (; row < count; row += REST)
    multiply_few<REST, VECTORS>(a + long(row) * inputs, inputs, weight, out + long(row) * outputs,
                                outputs);
}

// The products of a block of tiles at all places.
//
// places: (36, tiles, inputs), `pitch_in` floats from one place to the next; weight: (36, panels,
// inputs, columns); products: (36, tiles, outputs), `pitch_out` floats apart. Both blocks have room
// for a multiple of REST tiles.
inline void multiply_places(const float *places, long pitch_in, int count, int inputs,
                            const float *weight, int columns, int outputs, float *products,
                            long pitch_out) {
  const auto product = columns == LANES ? multiply<1> : multiply<2>;
  for (int place = 0; place < PATCH * PATCH; place++)
    for (int column = 0; column < outputs; column += columns)
      product(places + place * pitch_in, count, inputs,
              weight + (long(place) * outputs + column) * inputs,
              products + place * pitch_out + column, outputs);
}

}  // namespace
