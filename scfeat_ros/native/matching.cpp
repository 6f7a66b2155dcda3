// Nearest neighbours both ways between two sets of descriptors, without keeping their similarities.
//
// matcher.py says the same in PyTorch's operators.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bfloat16.h"
#include "call.h"
#include "lanes.h"
#include "matching.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// Inner products of the rows of two matrices, a block of ROWS by COLUMNS at a time.
class ByVectors {
 public:
  static constexpr bool EXACT = true;
  static constexpr int ROWS = BLOCK_ROWS, VECTORS = BLOCK_VECTORS, COLUMNS = BLOCK_COLUMNS;

  struct Thread {};  // nothing to be set up

  ByVectors(Matrix a, Matrix b, int threads)
      : a(a), packed(size_t(parts(b.rows, COLUMNS)) * COLUMNS * b.length) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int tile = 0; tile < parts(b.rows, COLUMNS); tile++)
      for (int k = 0; k < b.length; k++)
        for (int j = 0; j < COLUMNS; j++)
          packed[(size_t(tile) * b.length + k) * COLUMNS + j] = b.row(tile * COLUMNS + j)[k];
  }

  void operator()(int block, int tile, float (*out)[COLUMNS]) const {
    const float *row[ROWS];
    for (int r = 0; r < ROWS; r++) row[r] = a.row(block * ROWS + r);
    Lanes sum[ROWS][VECTORS] = {};
    const float *from = packed.data() + size_t(tile) * a.length * COLUMNS;
    for (int k = 0; k < a.length; k++, from += COLUMNS)
      for (int v = 0; v < VECTORS; v++) {
        const Lanes value = load<Lanes>(from + v * LANES);
        for (int r = 0; r < ROWS; r++) sum[r][v] += row[r][k] * value;
      }
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < VECTORS; v++) store(out[r] + v * LANES, sum[r][v]);
  }

 private:
  Matrix a;
  std::vector<float> packed;  // of `b` by tiles of columns, value by value
};

#if defined(HAS_TILES)
// The same by AMX's tiles of bf16. A number is the sum of two of bf16 but for 2^-17 of it, and the
// product of the two smaller ones is left out: unit vectors come out within 2e-5.
class ByTiles {
 public:
  static constexpr bool EXACT = false;
  static constexpr int SIDE = 16, DEPTH = 32;  // of a tile: 16 by 32 bf16, 16 by 16 float
  static constexpr int ROWS = 2 * SIDE, COLUMNS = 2 * SIDE;

  // Whether the system lets this process use them.
  static bool available() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return granted;
  }

  // Sets the tiles' shapes up, and as they were at its end.
  class Thread {
   public:
    Thread() {
      _tile_storeconfig(&before);
      Shapes shapes{};
      shapes.palette = 1;
      std::fill_n(shapes.bytes, 8, uint16_t(2 * DEPTH));
      std::fill_n(shapes.rows, 8, uint8_t(SIDE));
      _tile_loadconfig(&shapes);
    }
    ~Thread() {
      if (before.palette)
        _tile_loadconfig(&before);
      else
        _tile_release();
    }
    Thread(const Thread &) = delete;

   private:
    struct alignas(64) Shapes {
      uint8_t palette, start_row, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    };
    static_assert(sizeof(Shapes) == 64);
    Shapes before;
  };

  ByTiles(Matrix a, Matrix b, int threads)
      : steps(parts(a.length, DEPTH)),
        left(pack(a, false, threads)),
        right(pack(b, true, threads)) {}

  void operator()(int block, int tile, float (*out)[COLUMNS]) const {
    constexpr int LINE = 2 * DEPTH, OUT = COLUMNS * sizeof(float);  // bytes
    const bfloat16 *a = left.data() + block * block_size();
    const bfloat16 *b = right.data() + tile * block_size();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int k = 0; k < steps; k++, a += 4 * TILE, b += 4 * TILE) {
      _tile_loadd(4, a, LINE);
      _tile_loadd(5, a + TILE, LINE);
      _tile_loadd(6, b, LINE);
      _tile_loadd(7, b + TILE, LINE);
      add();
      _tile_loadd(6, b + 2 * TILE, LINE);
      _tile_loadd(7, b + 3 * TILE, LINE);
      add();
      _tile_loadd(4, a + 2 * TILE, LINE);
      _tile_loadd(5, a + 3 * TILE, LINE);
      _tile_loadd(6, b, LINE);
      _tile_loadd(7, b + TILE, LINE);
      add();
    }
    _tile_stored(0, out[0], OUT);
    _tile_stored(1, out[0] + SIDE, OUT);
    _tile_stored(2, out[SIDE], OUT);
    _tile_stored(3, out[SIDE] + SIDE, OUT);
    asm volatile("" ::: "memory");  // GCC does not know what the instructions above write
  }

 private:
  static constexpr int TILE = SIDE * DEPTH;  // bf16 numbers
  size_t block_size() const { return size_t(steps) * 4 * TILE; }

  static void add() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  // By blocks of rows and steps of DEPTH values: the two tiles of the larger parts, then those of
  // the smaller ones. `pairs`: a line holds two values of every row, as the right factor's do.
  std::vector<bfloat16> pack(Matrix from, bool pairs, int threads) const {
    const int blocks = parts(from.rows, ROWS);
    std::vector<bfloat16> packed(blocks * block_size());
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < blocks * ROWS; i++)
      for (int k = 0; k < steps; k++) {
        float values[DEPTH] = {};
        bfloat16 larger[DEPTH], smaller[DEPTH];
        std::copy_n(from.row(i) + k * DEPTH, std::min(DEPTH, from.length - k * DEPTH), values);
        for (int j = 0; j < DEPTH; j++) {
          write(larger[j], values[j]);
          write(smaller[j], values[j] - read(larger[j]));
        }
        bfloat16 *tile = packed.data() + i / ROWS * block_size() + (4 * k + i % ROWS / SIDE) * TILE;
        for (int j = 0; j < DEPTH; j += 2) {
          bfloat16 *to = tile + (pairs ? j * SIDE + i % SIDE * 2 : i % SIDE * DEPTH + j);
          std::copy_n(larger + j, 2, to);
          std::copy_n(smaller + j, 2, to + 2 * TILE);
        }
      }
    asm volatile("" ::: "memory");  // nor what they read
    return packed;
  }

  int steps;
  std::vector<bfloat16> left, right;
};
#endif

// The largest and the second largest similarity of many, lane by lane, and the first's place.
struct Best {
  Lanes first, second;
  Integers place;

  void take(Lanes value, Integers at) {
    const auto larger = value > first;
    const Lanes smaller = larger ? first : value;
    second = smaller > second ? smaller : second;
    place = larger ? at : place;
    first = larger ? value : first;
  }
};

// The same of the columns.
struct OfColumns {
  std::vector<float> first, second;
  std::vector<int32_t> place;

  explicit OfColumns(size_t count) : first(count, LEAST), second(count, LEAST), place(count, 0) {}
};

// Of the rows of `a` (rows, length) among those of `b` (columns, length), and the other way round:
// the first nearest, its similarity, and where wanted the second largest similarity.
template <typename Products>
void nearest(const float *a_values, int rows, const float *b_values, int columns, int length,
             int64_t *row_place, float *row_first, float *row_second, int64_t *column_place,
             float *column_second, int threads) {
  const Matrix a{a_values, rows, length}, b{b_values, columns, length};
  constexpr int ROWS = Products::ROWS, COLUMNS = Products::COLUMNS;
  const Products products(a, b, threads);
  const int tiles = parts(b.rows, COLUMNS);
  std::vector<OfColumns> of_columns(threads, OfColumns(size_t(tiles) * COLUMNS));
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] const typename Products::Thread prepared;
    OfColumns &found = of_columns[omp_get_thread_num()];
    alignas(64) float values[ROWS][COLUMNS];
    Integers lane;
    for (int k = 0; k < LANES; k++) lane[k] = k;
#pragma omp for schedule(static)
    for (int block = 0; block < parts(a.rows, ROWS); block++) {
      const int start = block * ROWS, filled = std::min(ROWS, a.rows - start);
      Best best[ROWS];
      std::fill_n(best, ROWS, Best{Lanes{} + LEAST, Lanes{} + LEAST, Integers{}});
      for (int tile = 0; tile < tiles; tile++) {
        products(block, tile, values);
        const int left = b.rows - tile * COLUMNS;
        for (int r = 0; left < COLUMNS && r < filled; r++)
          std::fill(values[r] + left, values[r] + COLUMNS, LEAST);
        for (int v = 0; v < COLUMNS; v += LANES) {
          const int column = tile * COLUMNS + v;
          Best down = {load<Lanes>(&found.first[column]), load<Lanes>(&found.second[column]),
                       load<Integers>(&found.place[column])};
          for (int r = 0; r < filled; r++) {
            const Lanes value = load<Lanes>(values[r] + v);
            best[r].take(value, lane + column);
            down.take(value, Integers{} + (start + r));
          }
          store(&found.first[column], down.first);
          store(&found.second[column], down.second);
          store(&found.place[column], down.place);
        }
      }
      for (int r = 0; r < filled; r++) {
        Nearest nearest;
        for (int k = 0; k < LANES; k++)
          nearest.take(best[r].first[k], best[r].place[k], best[r].second[k]);
        if (!Products::EXACT) {
          const float exact = product(a, start + r, b, nearest.place);
          nearest.second += exact - nearest.first;  // of equally near ones the difference stays 0
          nearest.first = exact;
        }
        row_place[start + r] = nearest.place;
        row_first[start + r] = nearest.first;
        if (row_second != nullptr) row_second[start + r] = nearest.second;
      }
    }
  }
  for (int j = 0; j < b.rows; j++) {
    Nearest nearest;
    for (const OfColumns &part : of_columns)
      nearest.take(part.first[j], part.place[j], part.second[j]);
    column_place[j] = nearest.place;
    if (column_second == nullptr) continue;
    column_second[j] = nearest.second;
    if (!Products::EXACT)
      column_second[j] += product(a, nearest.place, b, j) - nearest.first;
  }
}
}  // namespace

// Whether this CPU multiplies bf16 by tiles, and the system lets it.
extern "C" int has_tiles() {
#if defined(HAS_TILES)
  return ByTiles::available();
#else
  return 0;
#endif
}

EXPORT(nearest, nearest<ByVectors>)
#if defined(HAS_TILES)
EXPORT(nearest_by_tiles, nearest<ByTiles>)
#endif
