// Convolutions as matrix products: 1x1, and those that minimal filtering does not compute.
//
// Maps are (rows, columns, channels) of fp32 or bf16. A block of results is the product of their
// surroundings, pixel by pixel beside each other, with the weights.

#include <omp.h>

#include <algorithm>
#include <vector>

#include "after.h"
#include "bfloat16.h"
#include "call.h"
#include "lanes.h"

namespace {

// How maps and weights of a type are multiplied: PAIR numbers of a pixel at a time, with lanes of
// weights that hold as many of every output.

template <typename T>
struct Products {
  static constexpr int PAIR = 1;
  typedef Lanes Factor;

  static Factor repeat(const T *from) { return Lanes{} + read(*from); }
  static Factor weights(const T *from) { return read_lanes(from); }
  static Lanes add(Lanes sum, Factor one, Factor weight) { return sum + one * weight; }
};

#if defined(__AVX512BF16__)
template <>
struct Products<bfloat16> {
  static constexpr int PAIR = 2;
  typedef __m512i Factor;

  static Factor repeat(const bfloat16 *from) { return _mm512_set1_epi32(load<int32_t>(from)); }
  static Factor weights(const bfloat16 *from) { return load<__m512i>(from); }
  static Lanes add(Lanes sum, Factor one, Factor weight) {
    return _mm512_dpbf16_ps(sum, __m512bh(one), __m512bh(weight));
  }
};
#endif

// Blocks of sums in registers: SUMS / VECTORS pixels by VECTORS of their results.
constexpr int SUMS = REGISTERS == 32 ? 24 : 12;
constexpr int MOST_VECTORS = REGISTERS == 32 ? 4 : 2;
constexpr int BLOCK = SUMS;  // pixels

struct Shape {
  int height, width, inputs;  // of the map that is read
  int side, stride;           // of the convolution, padded by side / 2
  int outputs;

  int rows() const { return (height - 1) / stride + 1; }
  int columns() const { return (width - 1) / stride + 1; }
  int depth() const { return side * side * inputs; }
  bool is_product() const { return side == 1 && stride == 1; }
};

// The surroundings of `count` results from one on, each `depth` numbers; zeros about the map.
template <typename T>
void gather(const T *x, Shape shape, long first, int count, T *out) {
  const int across = shape.columns(), around = shape.side / 2;
  for (int n = 0; n < count; n++) {
    const int top = int((first + n) / across) * shape.stride - around;
    const int left = int((first + n) % across) * shape.stride - around;
    for (int row = top; row < top + shape.side; row++)
      for (int column = left; column < left + shape.side; column++, out += shape.inputs) {
        if (row < 0 || row >= shape.height || column < 0 || column >= shape.width)
          std::fill_n(out, shape.inputs, T{});
        else
          std::copy_n(x + (long(row) * shape.width + column) * shape.inputs, shape.inputs, out);
      }
  }
}

// VECTORS of the results of a block of pixels, whose surroundings have space for BLOCK of them.
template <typename T, int VECTORS>
void multiply(const T *from, int depth, int count, const T *weights, After<T> after, int channel,
              int outputs, long first, T *out) {
  using P = Products<T>;
  constexpr int ROWS = SUMS / VECTORS;
  for (int row = 0; row < count; row += ROWS, from += long(ROWS) * depth) {
    Lanes sum[ROWS][VECTORS] = {};
    const T *weight = weights;
    for (int k = 0; k < depth; k += P::PAIR, weight += VECTORS * LANES * P::PAIR) {
      typename P::Factor w[VECTORS];
      for (int v = 0; v < VECTORS; v++) w[v] = P::weights(weight + v * LANES * P::PAIR);
      for (int r = 0; r < ROWS; r++) {
        const auto one = P::repeat(from + long(r) * depth + k);
        for (int v = 0; v < VECTORS; v++) sum[r][v] = P::add(sum[r][v], one, w[v]);
      }
    }
#pragma GCC unroll 24
    for (int r = 0; r < ROWS; r++) {
      if (row + r >= count) return;
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) {
        const int to = channel + v * LANES;
        const long place = (first + row + r) * outputs + to;
        write_lanes(out + place, after(sum[r][v], to, place));
      }
    }
  }
}

// Vectors of the panel of weights that starts at an output channel.
inline int vectors(int channel, int outputs) {
  const int left = (outputs - channel) / LANES;
  return left >= MOST_VECTORS ? MOST_VECTORS : left >= 2 ? 2 : 1;
}

// Weights are in panels of some output channels each: (depth / PAIR, columns, PAIR).
template <typename T>
void direct(const T *x, int height, int width, int inputs, const T *weights, int side, int stride,
            int outputs, const float *bias, const T *plus, bool relu, T *out, int threads) {
  const Shape shape{height, width, inputs, side, stride, outputs};
  const After<T> after{bias, plus, relu};
  const int depth = shape.depth();
  const long pixels = long(shape.rows()) * shape.columns();
#pragma omp parallel num_threads(threads)
  {
    const auto gathered = space<T>(long(BLOCK) * depth);
#pragma omp for schedule(static)
    for (long first = 0; first < pixels; first += BLOCK) {
      const int count = int(std::min<long>(BLOCK, pixels - first));
      const T *from = x + first * depth;
      if (!shape.is_product() || count < BLOCK) {
        gather(x, shape, first, count, gathered.get());
        std::fill_n(gathered.get() + long(count) * depth, long(BLOCK - count) * depth, T{});
        from = gathered.get();
      }
      const T *panel = weights;
      for (int channel = 0; channel < shape.outputs;) {
        const int across = vectors(channel, shape.outputs);
        const auto way = across == 1   ? multiply<T, 1>
                         : across == 2 ? multiply<T, 2>
                                       : multiply<T, MOST_VECTORS>;
        way(from, depth, count, panel, after, channel, shape.outputs, first, out);
        panel += long(across) * LANES * depth;
        channel += across * LANES;
      }
    }
  }
}

}  // namespace

extern "C" {

// Floats of a vector: channels are multiples of it.
int lanes() { return LANES; }

// Output channels of the panel of weights that starts at one.
int direct_columns(int channel, int outputs) { return vectors(channel, outputs) * LANES; }

int direct_pair_float() { return Products<float>::PAIR; }
int direct_pair_bfloat16() { return Products<bfloat16>::PAIR; }
}

EXPORT_TYPES(direct)
