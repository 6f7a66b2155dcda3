// Nearest neighbours both ways between two sets of descriptors: sought by products of integers, and
// told apart by exact ones where they are near.
//
// A similarity and its place share an integer, its key, so that the larger of two is one
// instruction. A row keeps the two largest keys of every lane of its columns, a column those of
// shares of the rows; among the ones that are near the largest, products in fp32 decide.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bfloat16.h"
#include "call.h"
#include "integers.h"
#include "lanes.h"
#include "matching.h"

#if defined(HAS_INT8) || defined(HAS_INT16)
#define HAS_INTEGERS

namespace {

#if defined(HAS_INT8)
typedef int8_t Number;
#else
typedef int16_t Number;
#endif
typedef Number NumberLanes __attribute__((vector_size(LANES * sizeof(Number))));
constexpr int PER_LANE = sizeof(int32_t) / sizeof(Number);
constexpr int LARGEST = (1 << (8 * sizeof(Number) - 1)) - 1;

constexpr int ROWS = BLOCK_ROWS, VECTORS = BLOCK_VECTORS, COLUMNS = BLOCK_COLUMNS;
constexpr int GROUP = 64;   // rows that meet a tile of columns while it is in the first cache
constexpr int SHARES = 16;  // of the rows, at most
constexpr int32_t FLIPPED = int32_t(OFFSET<Number> * 0x01010101u);  // adds it to all
constexpr int32_t NOTHING = INT32_MIN;

// A matrix rounded to integers, the largest number to LARGEST, unless a row's norm would be above
// the limit.
class Rounded {
 public:
  const int rows, words;  // a word holds the numbers of a lane
  float norm;             // of the longest row

  Rounded(Matrix from, float limit, int threads)
      : rows(from.rows),
        words(parts(from.length, PER_LANE)),
        numbers(size_t(rows) * words),
        sums(rows) {
    Lanes largest{};
    float most = 1e-30f;  // of the sums of squares
    for (int i = 0; i < rows; i++) {
      Lanes squares{};
      by_lanes(from.length, [&, row = from.row(i)](int k, auto lanes) {
        const Lanes value = lanes.read(row + k), size = magnitude(value);
        largest = size > largest ? size : largest;
        squares += value * value;
      });
      most = std::max(most, sum_of_lanes(squares));
    }
    const float longest = std::sqrt(most);
    const float scale = std::min(LARGEST / std::max(largest_lane(largest), 1e-30f), limit / longest);
    norm = scale * longest;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < rows; i++) {
      Integers sum{};
      Number *to = reinterpret_cast<Number *>(&numbers[size_t(i) * words]);
      by_lanes(from.length, [&, row = from.row(i)](int k, auto lanes) {
        const NumberLanes rounded = round_to<NumberLanes>(lanes.read(row + k) * scale);
        std::memcpy(to + k, &rounded, lanes.count * sizeof(Number));
        sum += __builtin_convertvector(rounded, Integers);
      });
      for (int k = 0; k < LANES; k++) sums[i] += sum[k];
    }
  }

  const int32_t *row(int i) const { return &numbers[size_t(i) * words]; }
  int32_t sum(int i) const { return sums[i]; }

  // By tiles of columns, word by word; what lies beyond the end repeats the last row.
  std::vector<int32_t> tiles(int threads) const {
    std::vector<int32_t> tiles(size_t(parts(rows, COLUMNS)) * COLUMNS * words);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int tile = 0; tile < parts(rows, COLUMNS); tile++)
      for (int j = 0; j < COLUMNS; j++) {
        const int32_t *from = row(std::min(tile * COLUMNS + j, rows - 1));
        int32_t *to = &tiles[size_t(tile) * COLUMNS * words + j];
        for (int k = 0; k < words; k++) to[k * COLUMNS] = from[k] ^ FLIPPED;
      }
    return tiles;
  }

 private:
  std::vector<int32_t> numbers, sums;
};

// A similarity, and in the last bits its place: of equal ones the smaller place has the larger key.
struct Keys {
  int bits, last;

  explicit Keys(int places) : bits(0) {
    while (1 << bits < places) bits++;
    last = (1 << bits) - 1;
  }
  // All similarities must be above it, and below its negative.
  int32_t lowest() const { return -(1 << (30 - bits)) * 2; }
  int code(int place) const { return last - place; }
  int place(int32_t key) const { return last - (key & last); }
};

// The two largest keys of many, lane by lane.
struct Largest {
  Integers first = Integers{} + NOTHING, second = first;

  void take(Integers key) {
    const Integers less = key < first ? key : first;
    second = less > second ? less : second;
    first = key > first ? key : first;
  }
};

// Decides among candidates, whose similarities as integers are uncertain by a margin. `second`:
// whether the second largest is wanted, too.
template <typename Place, typename Product>
Nearest decide(const int32_t *key, int count, Keys keys, int margin, bool second, Place place,
               Product product) {
  int32_t largest = NOTHING, next = NOTHING;
  for (int c = 0; c < count; c++) {
    next = std::max(next, std::min(largest, key[c]));
    largest = std::max(largest, key[c]);
  }
  const int32_t least = ((second ? next : largest) >> keys.bits) - margin;
  const int32_t near = std::max(least, keys.lowest() + 1) * (1 << keys.bits);
  Nearest nearest;
  for (int c = 0; c < count; c++)
    if (key[c] >= near) {
      const int at = place(c);
      nearest.take(product(at), at);
    }
  return nearest;
}

// Sums of the products of a block of rows of one and a tile of columns of the other.
struct Products {
  const Rounded &left;
  const std::vector<int32_t> right;

  // Of some rows from `start` on, the last of them repeated.
  void operator()(int start, int rows, int tile, Integers (&sum)[ROWS][VECTORS]) const {
    const int32_t *row[ROWS];
    for (int r = 0; r < ROWS; r++) {
      const int i = start + std::min(r, rows - 1);
      row[r] = left.row(i);
      for (int v = 0; v < VECTORS; v++) sum[r][v] = Integers{} - OFFSET<Number> * left.sum(i);
    }
    const int32_t *from = right.data() + size_t(tile) * left.words * COLUMNS;
    for (int k = 0; k < left.words; k++, from += COLUMNS) {
      Integers other[VECTORS];
      for (int v = 0; v < VECTORS; v++) other[v] = load<Integers>(from + v * LANES);
      for (int r = 0; r < ROWS; r++) {
        const Integers one = Integers{} + row[r][k];
        for (int v = 0; v < VECTORS; v++) sum[r][v] = add_products<Number>(sum[r][v], one, other[v]);
      }
    }
  }
};

// Sets the sums beyond so many columns.
inline void hide(int columns, int32_t value, Integers (&sum)[ROWS][VECTORS]) {
  Integers lane;
  for (int k = 0; k < LANES; k++) lane[k] = k;
  for (int v = 0; v < VECTORS; v++)
    for (int r = 0; r < ROWS; r++)
      sum[r][v] = lane + v * LANES < columns ? sum[r][v] : Integers{} + value;
}

// A block of sums: for its rows their columns, from the vector `vector` on, and for these its rows,
// from `row` of the share on.
inline void take(const Integers (&sum)[ROWS][VECTORS], int filled, Keys keys, int vector, int row,
                 Largest *across, Largest (&down)[VECTORS]) {
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
    if (r >= filled) break;
    Largest along = across[r];
    for (int v = 0; v < VECTORS; v++) {
      const Integers shifted = sum[r][v] << keys.bits;
      along.take(shifted + keys.code(vector + v));
      down[v].take(shifted + keys.code(row + r));
    }
    across[r] = along;
  }
}

// Of the rows of `a` (rows, length) among those of `b` (columns, length), and the other way round:
// the first nearest, its similarity, and where wanted the second largest similarity.
void nearest_by_integers(const float *a_values, int rows, const float *b_values, int columns,
                         int length, int64_t *row_place, float *row_first, float *row_second,
                         int64_t *column_place, float *column_second, int threads) {
  const Matrix a{a_values, rows, length}, b{b_values, columns, length};
  const int tiles = parts(columns, COLUMNS), vectors = tiles * VECTORS;
  const int share_rows = parts(parts(rows, SHARES), ROWS) * ROWS;
  const int shares = parts(rows, share_rows);
  const Keys keys(std::max(vectors, share_rows));
  // by Cauchy and Schwarz; and rounding makes a row longer
  const float limit = std::sqrt(-float(keys.lowest())) - std::sqrt(float(length));
  const Rounded left(a, limit, threads), other(b, limit, threads);
  const Products products{left, other.tiles(threads)};
  // five times the standard deviation of the difference of two
  // (descriptors that are no numbers have no norm)
  const int margin = int(std::min(1e6f, 1.5f * (left.norm + other.norm)));
  const bool second = row_second != nullptr;
  std::vector<Largest> of_columns(size_t(shares) * vectors);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int share = 0; share < shares; share++) {
    const int begin = share * share_rows, end = std::min(begin + share_rows, rows);
    for (int start = begin; start < end; start += GROUP) {
      const int stop = std::min(start + GROUP, end);
      Largest of_rows[GROUP];
      for (int tile = 0; tile < tiles; tile++) {
        Largest *kept = &of_columns[size_t(share) * vectors + tile * VECTORS];
        Largest down[VECTORS];
        std::copy_n(kept, VECTORS, down);
        for (int block = start; block < stop; block += ROWS) {
          const int filled = std::min(ROWS, stop - block);
          Integers sum[ROWS][VECTORS];
          products(block, filled, tile, sum);
          if (tile == tiles - 1) hide(columns - tile * COLUMNS, keys.lowest(), sum);
          take(sum, filled, keys, tile * VECTORS, block - begin, &of_rows[block - start], down);
        }
        std::copy_n(down, VECTORS, kept);
      }
      for (int i = start; i < stop; i++) {
        int32_t key[2 * LANES];
        std::memcpy(key, &of_rows[i - start], sizeof key);
        const Nearest found = decide(
            key, 2 * LANES, keys, margin, second,
            [&](int c) { return keys.place(key[c]) * LANES + c % LANES; },
            [&](int j) { return product(a, i, b, j); });
        row_place[i] = found.place;
        row_first[i] = found.first;
        if (second) row_second[i] = found.second;
      }
    }
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int j = 0; j < columns; j++) {
    int32_t key[2 * SHARES];
    for (int share = 0; share < shares; share++) {
      const Largest &down = of_columns[size_t(share) * vectors + j / LANES];
      key[2 * share] = down.first[j % LANES];
      key[2 * share + 1] = down.second[j % LANES];
    }
    const Nearest found = decide(
        key, 2 * shares, keys, margin, second,
        [&](int c) { return c / 2 * share_rows + keys.place(key[c]); },
        [&](int i) { return product(a, i, b, j); });
    column_place[j] = found.place;
    if (second) column_second[j] = found.second;
  }
}
}  // namespace

EXPORT(nearest_by_integers, nearest_by_integers)
#endif

// Of the integers by which this CPU finds neighbours faster than by floats, 0 for none.
extern "C" int integer_bits() {
#if defined(HAS_INTEGERS)
  return 8 * sizeof(Number);
#else
  return 0;
#endif
}
