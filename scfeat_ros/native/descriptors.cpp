// Descriptors of keypoints out of feature maps: a place and its surroundings, projected.
//
// model/descriptors.py says the same in PyTorch's operators.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "bfloat16.h"
#include "call.h"
#include "lanes.h"

namespace {

// As in descriptors.py: sides of blocks of cells whose means are the surroundings, of F_cn (each
// divides the next) and of the encoder's layers; pixels per cell.
constexpr int BLOCKS[] = {4, 8, 16}, ENCODER_BLOCK = 8;
constexpr int STRIDE = 4, LAYER2_STRIDE = 8, LAYER3_STRIDE = 16;
constexpr int LEVELS = 5;

constexpr int ROWS = REGISTERS == 32 ? 3 : 1, VECTORS = 8;  // of sums in registers

// A channels-last map.
template <typename T>
struct Map {
  const T *values;
  int height, width, channels;

  const T *at(int row, int column) const {
    return values + (long(row) * width + column) * channels;
  }
};

// The four cells about a position along an axis, and the weights of a cubic B-spline. The border
// repeats.
struct Cells {
  int at[4];
  float weight[4];

  Cells(float position, int size) {
    const float first = std::floor(position) - 1;
    for (int k = 0; k < 4; k++) {
      const float distance = std::fabs(first + k - position);
      const float outer = std::max(2 - distance, 0.0f), inner = std::max(1 - distance, 0.0f);
      weight[k] = (outer * outer * outer - 4 * inner * inner * inner) / 6;
      at[k] = std::clamp(int(first) + k, 0, size - 1);
    }
  }
};

// The weighted sum of cells of up to `MAPS` maps.
template <int MAPS>
class Sum {
 public:
  // The cells of a map about a point of the image (x, y); `stride` pixels per cell.
  void add(Map<float> map, int stride, const float *point) {
    const Cells columns((point[0] + 0.5f) / stride - 0.5f, map.width);
    const Cells rows((point[1] + 0.5f) / stride - 0.5f, map.height);
    for (int r = 0; r < 4; r++)
      for (int c = 0; c < 4; c++) {
        weight[count] = rows.weight[r] * columns.weight[c];
        cell[count] = map.at(rows.at[r], columns.at[c]);
        count += weight[count] != 0;
      }
  }

  // Adds it to `to`.
  void to(float *to, int channels) const {
    constexpr int AT_ONCE = 4;  // vectors of channels
    int k = 0;
    for (; k + AT_ONCE * LANES <= channels; k += AT_ONCE * LANES) {
      Lanes sum[AT_ONCE];
      for (int v = 0; v < AT_ONCE; v++) sum[v] = load<Lanes>(to + k + v * LANES);
      for (int n = 0; n < count; n++)
        for (int v = 0; v < AT_ONCE; v++)
          sum[v] += weight[n] * load<Lanes>(cell[n] + k + v * LANES);
      for (int v = 0; v < AT_ONCE; v++) store(to + k + v * LANES, sum[v]);
    }
    for (; k < channels; k++)
      for (int n = 0; n < count; n++) to[k] += weight[n] * cell[n][k];
  }

 private:
  int count = 0;
  const float *cell[16 * MAPS + 1];
  float weight[16 * MAPS + 1];
};

// Means of blocks of a map's cells, (height, width, channels), and these projected, (height, width,
// dim).
struct Level {
  int height, width, channels, stride;
  std::unique_ptr<float[]> means, projected;

  Level(int height, int width, int channels, int side, int stride, int dim)
      : height((height + side - 1) / side), width((width + side - 1) / side), channels(channels),
        stride(stride * side), means(space<float>(long(this->height) * this->width * channels)),
        projected(space<float>(long(this->height) * this->width * dim)) {}

  Map<float> map() const { return {means.get(), height, width, channels}; }
};

// The mean of block `cell`; blocks at the edge may be smaller.
template <typename T>
void mean_of_block(Map<T> map, int side, int across, int cell, float *__restrict mean) {
  const int top = cell / across * side, left = cell % across * side, channels = map.channels;
  const int bottom = std::min(top + side, map.height), right = std::min(left + side, map.width);
  std::fill_n(mean, channels, 0.0f);
  for (int y = top; y < bottom; y++)
    for (int x = left; x < right; x++) {
      const T *from = map.at(y, x);
#pragma omp simd
      for (int c = 0; c < channels; c++) mean[c] += read(from[c]);
    }
  const float share = 1.0f / ((bottom - top) * (right - left));
  for (int c = 0; c < channels; c++) mean[c] *= share;
}

inline void to_unit_norm(const float *from, int count, float *to) {
  float square = 0;
#pragma omp simd reduction(+ : square)
  for (int k = 0; k < count; k++) square += from[k] * from[k];
  const float scale = 1.0f / std::max(std::sqrt(square), 1e-12f);
  for (int k = 0; k < count; k++) to[k] = from[k] * scale;
}

// `columns` of (rows, inputs) times (inputs, dim), from one on that both pointers are at.
template <int COUNT>
void project_columns(const float *x, int rows, int inputs, const float *matrix, int dim,
                     float *out) {
  Lanes sum[ROWS][COUNT] = {};
  for (int k = 0; k < inputs; k++)
    for (int v = 0; v < COUNT; v++) {
      const Lanes weight = load<Lanes>(matrix + long(k) * dim + v * LANES);
      for (int r = 0; r < ROWS; r++) sum[r][v] += x[r * inputs + k] * weight;
    }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    if (r == rows) return;
#pragma GCC unroll 8
    for (int v = 0; v < COUNT; v++) store(out + long(r) * dim + v * LANES, sum[r][v]);
  }
}

// Up to ROWS of `x` (there is space for as many) times (inputs, dim).
inline void project(const float *x, int rows, int inputs, const float *matrix, int dim,
                    float *out) {
  int column = 0;
  for (; column + VECTORS * LANES <= dim; column += VECTORS * LANES)
    project_columns<VECTORS>(x, rows, inputs, matrix + column, dim, out + column);
  for (; column + LANES <= dim; column += LANES)
    project_columns<1>(x, rows, inputs, matrix + column, dim, out + column);
  for (; column < dim; column++)
    for (int r = 0; r < rows; r++) {
      float sum = 0;
      for (int k = 0; k < inputs; k++) sum += x[r * inputs + k] * matrix[long(k) * dim + column];
      out[long(r) * dim + column] = sum;
    }
}

// All threads: the means of a map's blocks, and these, of unit norm, times (channels, dim).
template <typename T>
void fill(Level &level, Map<T> map, int side, const float *matrix, int dim) {
  std::vector<float> unit(ROWS * level.channels);
  const int cells = level.height * level.width;
#pragma omp for schedule(static)
  for (int first = 0; first < cells; first += ROWS) {
    const int count = std::min(ROWS, cells - first);
    for (int r = 0; r < count; r++) {
      float *mean = level.means.get() + long(first + r) * level.channels;
      mean_of_block(map, side, level.width, first + r, mean);
      to_unit_norm(mean, level.channels, unit.data() + r * level.channels);
    }
    project(unit.data(), count, level.channels, matrix, dim,
            level.projected.get() + long(first) * dim);
  }
}

// Of F_cn and the encoder's layer2 and layer3, channels-last; points are (count, 2), the matrix is
// (dim, inputs), its inputs in the order of descriptors.py.
template <typename T>
void describe(const float *values, int height, int width, int channels, const T *values2,
              int height2, int width2, int channels2, const T *values3, int height3, int width3,
              int channels3, const float *points, long count, const float *matrix, int dim,
              float *out, int threads) {
  const Map<float> bridged{values, height, width, channels};
  const Map<T> layer2{values2, height2, width2, channels2};
  const Map<T> layer3{values3, height3, width3, channels3};
  const int inputs = 4 * channels + layer2.channels + layer3.channels;
  std::vector<Level> levels;
  for (int block : BLOCKS)
    levels.emplace_back(bridged.height, bridged.width, channels, block, STRIDE, dim);
  levels.emplace_back(layer2.height, layer2.width, layer2.channels, ENCODER_BLOCK, LAYER2_STRIDE,
                      dim);
  levels.emplace_back(layer3.height, layer3.width, layer3.channels, ENCODER_BLOCK, LAYER3_STRIDE,
                      dim);
  const auto transposed = space<float>(long(inputs) * dim);  // (inputs, dim)
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int k = 0; k < inputs; k++)
      for (int d = 0; d < dim; d++) transposed[long(k) * dim + d] = matrix[long(d) * inputs + k];
    const float *part = transposed.get() + long(channels) * dim;  // that of the next level
    for (int i = 0; i < LEVELS; i++) {
      if (i == 0) fill(levels[i], bridged, BLOCKS[0], part, dim);
      else if (i < 3) fill(levels[i], levels[i - 1].map(), BLOCKS[i] / BLOCKS[i - 1], part, dim);
      else fill(levels[i], i == 3 ? layer2 : layer3, ENCODER_BLOCK, part, dim);
      part += long(levels[i].channels) * dim;
    }
    std::vector<float> near(ROWS * channels);
#pragma omp for schedule(static)
    for (long first = 0; first < count; first += ROWS) {
      const int rows = int(std::min<long>(ROWS, count - first));
      for (int r = 0; r < rows; r++) {
        const float *point = points + 2 * (first + r);
        float *at_point = near.data() + r * channels;
        Sum<1> sum;
        sum.add(bridged, STRIDE, point);
        std::fill_n(at_point, channels, 0.0f);
        sum.to(at_point, channels);
        to_unit_norm(at_point, channels, at_point);
      }
      project(near.data(), rows, channels, transposed.get(), dim, out + first * dim);
      for (int r = 0; r < rows; r++) {
        Sum<LEVELS> sum;
        for (const Level &level : levels)
          sum.add({level.projected.get(), level.height, level.width, dim}, level.stride,
                  points + 2 * (first + r));
        sum.to(out + (first + r) * dim, dim);
      }
    }
  }
}

// Rows of (count, dim) to unit norm, in place.
void l2_normalize(float *rows, long count, int dim, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < count; i++) to_unit_norm(rows + i * dim, dim, rows + i * dim);
}

}  // namespace

EXPORT_TYPES(describe)
EXPORT(l2_normalize, l2_normalize)
