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

#include "after.h"
#include "winograd.h"

namespace {

constexpr int TILE = 4;
constexpr int BLOCK = 48;  // tiles, a multiple of ROWS

struct Map {
  int height, width, channels;

  int across() const { return (width + TILE - 1) / TILE; }
  long tiles() const { return long(across()) * ((height + TILE - 1) / TILE); }
  long at(int row, int column) const { return (long(row) * width + column) * channels; }

  // From one place of a block of transformed tiles to the next: not a power of two, which the cache
  // would hold badly.
  long pitch() const { return long(BLOCK) * channels + 16; }
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
      auto *to = out + long(n) * all().channels;
      to_places<Kind>(patch, channels, factor, all().pitch(), to);
      if (more) to_places<Kind>(beside, more, factor, all().pitch(), to + channels);
    }
  }
};

// A block and its tiles' scales -> tiles `first` to `first + count` of a map.
template <typename T>
void from_block(const float *products, const float *scales, Map map, long first, int count,
                After<T> after, T *out) {
  for (int n = 0; n < count; n++) {
    const int top = int((first + n) / map.across()) * TILE;
    const int left = int((first + n) % map.across()) * TILE;
    const int rows = std::min(TILE, map.height - top), columns = std::min(TILE, map.width - left);
    // by value: what lies in memory would be read again after every result
    const auto write = [=](int i, int j, int c, Lanes value) {
      const long place = map.at(top + i, left + j) + c;
      write_lanes(out + place, after(value, c, place));
    };
    from_places<TILE>(products + long(n) * map.channels, map.channels, scales[n], map.pitch(), rows,
                      columns, write);
  }
}

// Of one map, or of two beside each other (`more` channels in the second). Weights, scales and
// largest: see `Weights`.
template <typename T, typename Kind>
void winograd(const T *x, const T *beside, int height, int width, int inputs, int more,
              const typename Kind::Number *values, const float *weight_scales, float largest,
              int outputs, const float *bias, const T *plus, bool relu, T *out, int threads) {
  const Input<T> input{x, beside, height, width, inputs, more};
  const Weights<Kind> weights{values, weight_scales, largest};
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
      from_block(products.get(), scales, to, first, count, after, out);
    }
  }
}

}  // namespace

extern "C" {

int winograd_columns(int outputs) { return panel_columns(outputs); }

// Whether it is faster with products of integers of 16 bits than with those of floats.
int has_int16() {
#if defined(HAS_INT16)
  return 1;
#else
  return 0;
#endif
}
}

EXPORT_KINDS(winograd)
