// Nearest neighbours both ways between two sets of descriptors, without keeping their similarities.
//
// matcher.py says the same in PyTorch's operators.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.h"

namespace {

// a tile of sums fills the registers
constexpr int ROWS = LANES == 16 ? 8 : 4, VECTORS = LANES == 16 ? 3 : 2;
constexpr int STEP = LANES * VECTORS;
constexpr float LEAST = -1e30f;  // below every similarity

typedef int32_t Places __attribute__((vector_size(LANES * sizeof(int32_t))));

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

// The largest and the second largest similarity of many, lane by lane, and the first's place.
struct Best {
  Lanes first, second;
  Places place;

  void take(Lanes value, Places at) {
    const auto larger = value > first;
    const Lanes smaller = larger ? first : value;
    second = smaller > second ? smaller : second;
    place = larger ? at : place;
    first = larger ? value : first;
  }
};

// The same of the rows or columns one by one.
struct Nearest {
  std::vector<float> first, second;
  std::vector<int32_t> place;

  explicit Nearest(size_t count) : first(count, LEAST), second(count, LEAST), place(count, 0) {}

  void take(size_t i, float value, float next, int32_t at) {
    if (value > first[i]) {
      second[i] = std::max(first[i], next);
      first[i] = value;
      place[i] = at;
    } else {
      second[i] = std::max(second[i], value);
    }
  }
};

}  // namespace

extern "C" {

// Of the rows of `a` (rows, length) among those of `b` (columns, length), and the other way round:
// the first nearest, its similarity, and the second largest similarity.
void nearest(const float *a, int rows, const float *b, int columns, int length, int64_t *row_place,
             float *row_first, float *row_second, int64_t *column_place, float *column_second,
             int threads) {
  const int tiles = (columns + STEP - 1) / STEP, padded = tiles * STEP;
  // by tiles of columns, value by value; columns that fill the last tile start far below
  std::vector<float> packed(size_t(padded) * length), start(padded, 0.0f);
  std::fill(start.begin() + columns, start.end(), LEAST);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int tile = 0; tile < tiles; tile++)
    for (int k = 0; k < length; k++)
      for (int j = 0; j < STEP; j++) {
        const int column = tile * STEP + j;
        packed[(size_t(tile) * length + k) * STEP + j] =
            column < columns ? b[size_t(column) * length + k] : 0.0f;
      }
  std::vector<Nearest> of_columns(threads, Nearest(padded));
#pragma omp parallel num_threads(threads)
  {
    Nearest &found = of_columns[omp_get_thread_num()];
    Places lane;
    for (int k = 0; k < LANES; k++) lane[k] = k;
#pragma omp for schedule(static)
    for (int block = 0; block < (rows + ROWS - 1) / ROWS; block++) {
      const float *row[ROWS];
      Best best[ROWS];
      for (int r = 0; r < ROWS; r++) {
        // rows beyond the last repeat it: what is found again is not larger
        row[r] = a + size_t(std::min(block * ROWS + r, rows - 1)) * length;
        best[r] = {Lanes{} + LEAST, Lanes{} + LEAST, Places{}};
      }
      const int filled = std::min(ROWS, rows - block * ROWS);
      for (int tile = 0; tile < tiles; tile++) {
        Lanes sum[ROWS][VECTORS];
        for (int r = 0; r < ROWS; r++)
          for (int v = 0; v < VECTORS; v++)
            sum[r][v] = load<Lanes>(start.data() + tile * STEP + v * LANES);
        const float *from = packed.data() + size_t(tile) * length * STEP;
        for (int k = 0; k < length; k++, from += STEP)
          for (int v = 0; v < VECTORS; v++) {
            const Lanes value = load<Lanes>(from + v * LANES);
            for (int r = 0; r < ROWS; r++) sum[r][v] += row[r][k] * value;
          }
        for (int v = 0; v < VECTORS; v++) {
          const int column = tile * STEP + v * LANES;
          for (int r = 0; r < ROWS; r++) best[r].take(sum[r][v], lane + column);
          Best down = {load<Lanes>(&found.first[column]), load<Lanes>(&found.second[column]),
                       load<Places>(&found.place[column])};
          for (int r = 0; r < filled; r++) down.take(sum[r][v], Places{} + (block * ROWS + r));
          store(&found.first[column], down.first);
          store(&found.second[column], down.second);
          store(&found.place[column], down.place);
        }
      }
      for (int r = 0; r < filled; r++) {
        // of equal values the one with the smaller place is the first
        float first = LEAST, second = LEAST;
        int32_t place = 0;
        for (int k = 0; k < LANES; k++) {
          const float value = best[r].first[k];
          const bool larger = value > first || (value == first && best[r].place[k] < place);
          second = std::max({second, best[r].second[k], larger ? first : value});
          if (larger) {
            first = value;
            place = best[r].place[k];
          }
        }
        const int i = block * ROWS + r;
        row_place[i] = place;
        row_first[i] = first;
        row_second[i] = second;
      }
    }
  }
  Nearest &all = of_columns[0];
  for (int t = 1; t < threads; t++)  // in the order of the rows
    for (int j = 0; j < columns; j++)
      all.take(j, of_columns[t].first[j], of_columns[t].second[j], of_columns[t].place[j]);
  for (int j = 0; j < columns; j++) {
    column_place[j] = all.place[j];
    column_second[j] = all.second[j];
  }
}
}
