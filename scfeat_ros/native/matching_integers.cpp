// Nearest neighbours both ways between two sets of descriptors: sought by products of integers, and
// told apart by exact ones where they are near.
//
// A similarity and its place share an integer, its key, so that the larger of two is one
// instruction. A row keeps the largest keys of every lane of its columns, a column those of shares
// of the rows; of the ones that are near the largest, the products in fp32 decide.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bfloat16.h"
#include "call.h"
#include "lanes.h"
#include "matching.h"
#include "integers.h"

#if defined(HAS_BYTES) || defined(HAS_SHORTS)
#define HAS_INTEGERS

namespace {

#if defined(HAS_BYTES)
typedef int8_t Number;
#else
typedef int16_t Number;
constexpr int OFFSET = 0;
#endif
typedef Number NumberLanes __attribute__((vector_size(LANES * sizeof(Number))));
constexpr int PER_LANE = sizeof(int32_t) / sizeof(Number);
constexpr int LARGEST = (1 << (8 * sizeof(Number) - 1)) - 1;

constexpr int ROWS = BLOCK_ROWS, VECTORS = BLOCK_VECTORS, COLUMNS = BLOCK_COLUMNS;
constexpr int GROUP = 64;   // rows that meet a tile of columns while it is in the first cache
constexpr int SHARES = 16;  // of the rows, at most
constexpr int32_t FLIPPED = int32_t(OFFSET * 0x01010101u);  // adds it to every number
constexpr int32_t NOTHING = INT32_MIN;

inline Integers sum_products(Integers sum, Integers one, Integers other) {
#if defined(HAS_BYTES)
  return add_byte_products(sum, one, other);
#else
  return add_products(sum, one, other);
#endif
}

inline Integers larger(Integers a, Integers b) { return a > b ? a : b; }
inline Integers smaller(Integers a, Integers b) { return a < b ? a : b; }

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
        const Lanes value = lanes.read(row + k), magnitude = value < 0 ? -value : value;
        largest = magnitude > largest ? magnitude : largest;
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

// The largest keys of many, lane by lane.
template <int KEPT>
struct Best {
  Integers key[KEPT];

  Best() { std::fill_n(key, KEPT, Integers{} + NOTHING); }
  void take(Integers value) {
    if (KEPT == 2) key[KEPT - 1] = larger(key[KEPT - 1], smaller(key[0], value));
    key[0] = larger(key[0], value);
  }
};

struct Nearest {
  float first = LEAST, second = LEAST;
  int place = 0;

  void take(float value, int at) {
    const bool nearer = value > first || (value == first && at < place);
    second = std::max(second, nearer ? first : value);
    if (!nearer) return;
    first = value;
    place = at;
  }
};

// Decides among candidates, whose similarities as integers are uncertain by a margin.
template <int KEPT, typename Place, typename Product>
Nearest decide(const int32_t *key, int count, Keys keys, int margin, Place place, Product product) {
  int32_t first = NOTHING, second = NOTHING;
  for (int c = 0; c < count; c++) {
    second = std::max(second, std::min(first, key[c]));
    first = std::max(first, key[c]);
  }
  const int32_t least = (KEPT == 2 ? second : first) >> keys.bits;
  const int32_t near = std::max(least - margin, keys.lowest() + 1) * (1 << keys.bits);
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

  // Row by row from `rows` on, the last of them repeated.
  void operator()(int start, int rows, int tile, Integers (&sum)[ROWS][VECTORS]) const {
    const int32_t *row[ROWS];
    for (int r = 0; r < ROWS; r++) {
      const int i = start + std::min(r, rows - 1);
      row[r] = left.row(i);
      for (int v = 0; v < VECTORS; v++) sum[r][v] = Integers{} - OFFSET * left.sum(i);
    }
    const int32_t *from = right.data() + size_t(tile) * left.words * COLUMNS;
    for (int k = 0; k < left.words; k++, from += COLUMNS) {
      Integers other[VECTORS];
      for (int v = 0; v < VECTORS; v++) other[v] = load<Integers>(from + v * LANES);
      for (int r = 0; r < ROWS; r++) {
        const Integers one = Integers{} + row[r][k];
        for (int v = 0; v < VECTORS; v++) sum[r][v] = sum_products(sum[r][v], one, other[v]);
      }
    }
  }
};

// Sets what lies beyond the columns that there are.
inline void hide(int columns, int32_t value, Integers (&sum)[ROWS][VECTORS]) {
  Integers lane;
  for (int k = 0; k < LANES; k++) lane[k] = k;
  for (int v = 0; v < VECTORS; v++)
    for (int r = 0; r < ROWS; r++)
      sum[r][v] = lane + v * LANES < columns ? sum[r][v] : Integers{} + value;
}

template <int KEPT>
void search(Matrix a, Matrix b, int64_t *row_place, float *row_first, float *row_second,
            int64_t *column_place, float *column_second, int threads) {
  const int tiles = parts(b.rows, COLUMNS), vectors = tiles * VECTORS;
  const int share_rows = parts(parts(a.rows, SHARES), ROWS) * ROWS;
  const int shares = parts(a.rows, share_rows);
  const Keys keys(std::max(vectors, share_rows));
  // by Cauchy and Schwarz; and rounding makes a row longer
  const float limit = std::sqrt(-float(keys.lowest())) - std::sqrt(float(a.length));
  const Rounded left(a, limit, threads), other(b, limit, threads);
  const Products products{left, other.tiles(threads)};
  // five times the standard deviation of the difference of two
  const int margin = int(1.5f * (left.norm + other.norm));
  std::vector<Best<KEPT>> of_columns(size_t(shares) * vectors);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int share = 0; share < shares; share++) {
    const int begin = share * share_rows, end = std::min(begin + share_rows, a.rows);
    for (int start = begin; start < end; start += GROUP) {
      const int stop = std::min(start + GROUP, end);
      Best<KEPT> of_rows[GROUP];
      for (int tile = 0; tile < tiles; tile++) {
        Best<KEPT> *columns = &of_columns[size_t(share) * vectors + tile * VECTORS];
        Best<KEPT> down[VECTORS];
        std::copy_n(columns, VECTORS, down);
        for (int block = start; block < stop; block += ROWS) {
          const int rows = std::min(ROWS, stop - block);
          Integers sum[ROWS][VECTORS];
          products(block, rows, tile, sum);
          if (tile == tiles - 1) hide(b.rows - tile * COLUMNS, keys.lowest(), sum);
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; r++) {
            if (r >= rows) break;
            Best<KEPT> across = of_rows[block - start + r];
            for (int v = 0; v < VECTORS; v++) {
              const int vector = tile * VECTORS + v;
              const Integers shifted = sum[r][v] << keys.bits;
              across.take(shifted + keys.code(vector));
              down[v].take(shifted + keys.code(block + r - begin));
            }
            of_rows[block - start + r] = across;
          }
        }
        std::copy_n(down, VECTORS, columns);
      }
      for (int i = start; i < stop; i++) {
        int32_t key[KEPT * LANES];
        std::memcpy(key, &of_rows[i - start], sizeof key);
        const Nearest found = decide<KEPT>(
            key, KEPT * LANES, keys, margin,
            [&](int c) { return keys.place(key[c]) * LANES + c % LANES; },
            [&](int j) { return product(a, i, b, j); });
        row_place[i] = found.place;
        row_first[i] = found.first;
        if (KEPT == 2) row_second[i] = found.second;
      }
    }
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int j = 0; j < b.rows; j++) {
    int32_t key[KEPT * SHARES];
    for (int share = 0; share < shares; share++)
      for (int k = 0; k < KEPT; k++)
        key[share * KEPT + k] = of_columns[size_t(share) * vectors + j / LANES].key[k][j % LANES];
    const Nearest found = decide<KEPT>(
        key, KEPT * shares, keys, margin,
        [&](int c) { return c / KEPT * share_rows + keys.place(key[c]); },
        [&](int i) { return product(a, i, b, j); });
    column_place[j] = found.place;
    if (KEPT == 2) column_second[j] = found.second;
  }
}

// Of the rows of `a` (rows, length) among those of `b` (columns, length), and the other way round:
// the first nearest, its similarity, and where wanted the second largest similarity.
void nearest_by_integers(const float *a, int rows, const float *b, int columns, int length,
                         int64_t *row_place, float *row_first, float *row_second,
                         int64_t *column_place, float *column_second, int threads) {
  const auto way = row_second != nullptr ? search<2> : search<1>;
  way({a, rows, length}, {b, columns, length}, row_place, row_first, row_second, column_place,
      column_second, threads);
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
