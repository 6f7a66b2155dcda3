// 3x3 convolutions by minimal filtering, F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308): a tile of
// 4x4 results takes 36 products of a pixel's channels with the weights in place of 144.
//
// The input's tiles of 6x6, which overlap by two, are transformed; each of the 36 places of a tile
// is then a matrix product of its own over many tiles; their results are transformed back. A thread
// takes a block of tiles through all three, so that what lies between stays in its cache.
// Maps are (rows, columns, channels) of fp32 or bf16. What lies between is fp32, or the factors of
// the products are integers of 16 bits.

#include <omp.h>

#include <algorithm>
#include <vector>

#include "after.h"
#include "winograd.h"

namespace {

constexpr int TILE = 4;

// Columns of results that a panel of weights holds.
inline int columns(int outputs) { return outputs % (2 * LANES) ? LANES : 2 * LANES; }

// And back to a tile's rows or columns: A^T m.
inline void transform_output(const Lanes m[PATCH], Lanes out[TILE]) {
  const Lanes sum = m[1] + m[2], difference = m[1] - m[2];
  const Lanes sum2 = m[3] + m[4], difference2 = m[3] - m[4];
  out[0] = m[0] + sum + sum2;
  out[1] = difference + 2.0f * difference2;
  out[2] = sum + 4.0f * sum2;
  out[3] = difference + 8.0f * difference2 + m[5];
}

constexpr int BLOCK = 48;  // tiles, a multiple of ROWS

struct Map {
  int height, width, channels;

  int across() const { return (width + TILE - 1) / TILE; }
  long tiles() const { return long(across()) * ((height + TILE - 1) / TILE); }
  long at(int row, int column) const { return (long(row) * width + column) * channels; }

  // Of a block of transformed tiles: numbers from one place to the next (not a power of two, which
  // the cache would hold badly), and where a tile's values at a place lie.
  long pitch() const { return long(BLOCK) * channels + 16; }
  long in_block(int place, int tile) const { return place * pitch() + long(tile) * channels; }
};

// The patch of a tile; rows that reach over the map's edge are made in `space`, with zeros there.
template <typename T>
Patch<T> patch_of(const T *x, Map map, long tile, T *space) {
  const int top = int(tile / map.across()) * TILE - 1, left = int(tile % map.across()) * TILE - 1;
  const int begin = std::max(left, 0), end = std::min(left + PATCH, map.width);
  Patch<T> patch;
  for (int i = 0; i < PATCH; i++) {
    const int row = top + i;
    const bool there = row >= 0 && row < map.height;
    if (there && end - begin == PATCH) {
      patch.rows[i] = x + map.at(row, left);
      continue;
    }
    T *to = space + i * PATCH * map.channels;
    std::fill_n(to, PATCH * map.channels, T{});
    if (there)
      std::copy(x + map.at(row, begin), x + map.at(row, end), to + (begin - left) * map.channels);
    patch.rows[i] = to;
  }
  return patch;
}

// The input: a map, and maybe one more, whose channels follow.
template <typename T>
struct Input {
  const T *first, *second;
  int height, width, channels, more;

  Map all() const { return {height, width, channels + more}; }

  // Tiles `begin` to `begin + count` -> a block, and the scale of each. `space` is for a patch.
  template <typename Kind>
  void to_block(long begin, int count, T *space, float largest, typename Kind::Number *out,
                float *scales) const {
    const Map map{height, width, channels}, other{height, width, more};
    for (int n = 0; n < count; n++) {
      Patch<T> patch = patch_of(first, map, begin + n, space), beside;
      scales[n] = Kind::scale(patch, channels);
      if (more) {
        beside = patch_of(second, other, begin + n, space + PATCH * PATCH * channels);
        scales[n] = std::max(scales[n], Kind::scale(beside, more));
      }
      const float factor = largest / scales[n];
      auto *to = out + all().in_block(0, n);
      to_places<Kind>(patch, channels, factor, all().pitch(), to);
      if (more) to_places<Kind>(beside, more, factor, all().pitch(), to + channels);
    }
  }
};

// A block and its tiles' scales -> tiles `first` to `first + count` of a map.
template <typename T>
void from_places(const float *products, const float *scales, Map map, long first, int count,
                 After<T> after, T *out) {
  for (int n = 0; n < count; n++) {
    const int top = int((first + n) / map.across()) * TILE;
    const int left = int((first + n) % map.across()) * TILE;
    const int rows = std::min(TILE, map.height - top), columns = std::min(TILE, map.width - left);
    for (int c = 0; c < map.channels; c += LANES) {
      Lanes half[PATCH][TILE];
      for (int j = 0; j < PATCH; j++) {
        Lanes m[PATCH];
        for (int i = 0; i < PATCH; i++)
          m[i] = load<Lanes>(products + map.in_block(i * PATCH + j, n) + c);
        transform_output(m, half[j]);
      }
      for (int i = 0; i < rows; i++) {
        Lanes m[PATCH], y[TILE];
        for (int j = 0; j < PATCH; j++) m[j] = half[j][i];
        transform_output(m, y);
        for (int j = 0; j < columns; j++) {
          const long place = map.at(top + i, left + j) + c;
          write_lanes(out + place, after(y[j] * scales[n], c, place));
        }
      }
    }
  }
}

// Of one map, or of two beside each other (`more` channels in the second). Weights, scales and
// largest: see `Weights`.
template <typename T, typename Kind>
void winograd(const T *x, const T *beside, int height, int width, int inputs, int more,
              const typename Kind::Number *values, const float *weight_scales, float largest,
              int outputs, const float *bias, const T *plus, bool relu, T *out, int threads) {
  const Input<T> input{x, beside, height, width, inputs, more};
  const Weights<Kind> weights{values, weight_scales, largest, columns(outputs)};
  const After<T> after{bias, plus, relu};
  const Map from = input.all(), to{height, width, outputs};
  const long tiles = from.tiles();
#pragma omp parallel num_threads(threads)
  {
    const auto patch = space<T>(PATCH * PATCH * from.channels);
    const auto places = space<typename Kind::Number>(PATCH * PATCH * from.pitch());
    const auto products = space<float>(PATCH * PATCH * to.pitch());
    float scales[BLOCK];
    const int thread = omp_get_thread_num(), all = omp_get_num_threads();
    const long end = tiles * (thread + 1) / all;
    for (long first = tiles * thread / all; first < end; first += BLOCK) {
      const int count = int(std::min<long>(BLOCK, end - first));
      input.template to_block<Kind>(first, count, patch.get(), weights.largest, places.get(),
                                    scales);
      multiply_places(places.get(), from.pitch(), count, from.channels, weights, to.channels,
                      products.get(), to.pitch());
      from_places(products.get(), scales, to, first, count, after, out);
    }
  }
}

}  // namespace

extern "C" {

int winograd_columns(int outputs) { return columns(outputs); }

// Whether it is faster with products of integers of 16 bits than with those of floats.
int has_shorts() {
#if defined(HAS_SHORTS)
  return 1;
#else
  return 0;
#endif
}
}

EXPORT_KINDS(winograd)
