// The encoder's stem: a 7x7 convolution of stride 2 of the image, ReLU and max pooling, in one pass.
//
// Of every 2x2 pixels and three planes one cell of 12 channels: on the cells the convolution is one of
// 4x4 and stride 1, and runs by minimal filtering, F(3x3, 4x4), in a third of the products. Its
// result, four times as large as the pooled map, is never stored as a whole: a thread keeps two rows
// of tiles and pools them.

#include <omp.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "winograd.h"

namespace {

constexpr int TILE = 3;
constexpr int CHANNELS = 12;  // of a cell: three planes of two rows of two pixels
constexpr int BEFORE = 2;     // cells left of and above its own that a result depends on
constexpr int BLOCK = 24;     // tiles, a multiple of ROWS
constexpr int KEPT = 2 * TILE;  // rows of results

// One image's way through the stem, by one thread.
template <typename Kind, typename T>
class Stem {
 public:
  Stem(const float *planes, int height, int width, Weights<Kind> weights, const float *bias,
       int outputs)
      : planes(planes), bias(bias), weights(weights), width(width), rows(height / 2), across(width / 2),
        tiles((across + TILE - 1) / TILE), outputs(outputs),
        strip(long(PATCH) * cells() * CHANNELS + LANES),
        places(space<typename Kind::Number>(PATCH * PATCH * places_pitch() + LANES)),
        products(space<float>(PATCH * PATCH * products_pitch())),
        results(space<T>(long(KEPT) * across * outputs)),
        line(space<T>(long(across) * outputs)) {}

  // Rows `row` to `end` of the pooled map: the largest of 3x3 results.
  void run(int row, int end, T *out) {
    if (row >= end) return;
    const int first = std::max(2 * row - 1, 0), last = std::min(2 * end - 1, rows - 1);
    for (int tile_row = first / TILE; tile_row <= last / TILE; tile_row++) {
      convolve(tile_row);
      const int known = TILE * (tile_row + 1);
      for (; row < end && std::min(2 * row + 2, rows) <= known; row++) pool(row, out);
    }
  }

 private:
  const float *planes, *bias;
  Weights<Kind> weights;
  int width, rows, across, tiles, outputs;
  int first_row, next_row = -BEFORE;  // of cells: the strip's first, the first not gathered yet
  std::vector<float> strip;
  std::unique_ptr<typename Kind::Number[]> places;
  std::unique_ptr<float[]> products;
  std::unique_ptr<T[]> results, line;
  float scales[BLOCK];

  // Of a row of patches, which overlap.
  long cells() const { return long(tiles) * TILE + PATCH - TILE; }
  // From one place to the next: not a power of two, which the cache would hold badly.
  long places_pitch() const { return long(BLOCK) * CHANNELS + 16; }
  long products_pitch() const { return long(BLOCK) * outputs + 16; }

  // ReLU(convolution + bias) at a row and column.
  T *result(int row, int column) {
    return results.get() + (long(row % KEPT) * across + column) * outputs;
  }

  void convolve(int tile_row) {
    first_row = TILE * tile_row - BEFORE;
    for (int row = std::max(first_row, next_row); row < first_row + PATCH; row++) gather(row);
    next_row = first_row + PATCH;
    for (int first = 0; first < tiles; first += BLOCK) {
      const int count = std::min(BLOCK, tiles - first);
      for (int n = 0; n < count; n++) to_places(first + n, n);
      multiply_places(places.get(), places_pitch(), count, CHANNELS, weights, outputs,
                      products.get(), products_pitch());
      for (int n = 0; n < count; n++) from_places(n, TILE * tile_row, TILE * (first + n));
    }
  }

  // The cells of a row that is in the strip.
  float *cells_of(int row) {
    return strip.data() + (row + PATCH) % PATCH * cells() * CHANNELS;
  }

  // A row of cells, zeros about the image, to the strip.
  void gather(int row) {
    float *to = cells_of(row), *end = to + cells() * CHANNELS;
    if (row < 0 || row >= rows) return std::fill(to, end, 0.0f);
    float *inside = to + BEFORE * CHANNELS;
    std::fill(to, inside, 0.0f);
    std::fill(inside + long(across) * CHANNELS, end, 0.0f);
    for (int half = 0; half < 6; half++) {  // a row of two pixels of a plane
      const long above = long(half / 2) * 2 * rows + 2 * row + half % 2;
      const float *from = planes + above * width;
      for (int x = 0; x < across; x++) {
        inside[x * CHANNELS + 2 * half] = from[2 * x];
        inside[x * CHANNELS + 2 * half + 1] = from[2 * x + 1];
      }
    }
  }

  // A patch of the strip to tile `n` of the block. Vectors reach over a cell's end; what they leave
  // behind there the next tile overwrites.
  void to_places(int patch, int n) {
    Patch<float> cells;
    for (int i = 0; i < PATCH; i++)
      cells.rows[i] = cells_of(first_row + i) + long(patch) * TILE * CHANNELS;
    scales[n] = Kind::scale(cells, CHANNELS);
    ::to_places<Kind>(cells, CHANNELS, weights.largest / scales[n], places_pitch(),
                      places.get() + n * CHANNELS);
  }

  // Tile `n` of the block to the results at a row and column.
  void from_places(int n, int row, int column) {
    const auto write = [=](int i, int j, int c, Lanes value) {
      value += load<Lanes>(bias + c);
      write_lanes(result(row + i, column + j) + c, value > 0.0f ? value : Lanes{});
    };
    ::from_places<TILE>(products.get() + long(n) * outputs, outputs, scales[n], products_pitch(),
                        TILE, std::min(TILE, across - column), write);
  }

  // None is below zero, so that numbers of bf16 are in the order of their bits.
  void pool(int row, T *out) {
    const T *above = result(std::max(2 * row - 1, 0), 0), *here = result(2 * row, 0);
    const T *below = result(std::min(2 * row + 1, rows - 1), 0);
    T *__restrict largest = line.get();
    const long values = long(across) * outputs;
#pragma omp simd
    for (long k = 0; k < values; k++)
      largest[k] = std::max(std::max(above[k], below[k]), here[k]);
    const int pooled = (across + 1) / 2;
    for (int column = 0; column < pooled; column++) {
      const T *left = largest + std::max(2 * column - 1, 0) * long(outputs);
      const T *middle = largest + 2 * column * long(outputs);
      const T *right = largest + std::min(2 * column + 1, across - 1) * long(outputs);
      T *__restrict to = out + (long(row) * pooled + column) * outputs;
#pragma omp simd
      for (int k = 0; k < outputs; k++) to[k] = std::max(std::max(left[k], right[k]), middle[k]);
    }
  }
};

// T: of the result.
template <typename T, typename Kind>
void stem(const float *planes, int height, int width, const typename Kind::Number *values,
          const float *scales, float largest, const float *bias, int outputs, T *out, int threads) {
  const Weights<Kind> weights{values, scales, largest};
  const int pooled = (height / 2 + 1) / 2;
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), all = omp_get_num_threads();
    Stem<Kind, T>(planes, height, width, weights, bias, outputs)
        .run(pooled * thread / all, pooled * (thread + 1) / all, out);
  }
}

}  // namespace

EXPORT_KINDS(stem)
