// The passes between the network's convolutions, each in one sweep over memory.
//
// library.py compiles this file for the machine it runs on; kernels.py says the same in PyTorch and
// is what the tests compare against.
//
// Maps are channels-last, (rows, columns, channels), but for the few-channel maps at the image's
// resolution: there every row holds one line per channel, (rows, channels, columns), so that vectors
// run along the line.
// T is float or bfloat16; sums are accumulated in float along a row and in double over rows.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "bfloat16.h"
#include "call.h"
#include "lanes.h"

namespace {

// The robot size has few channels at the image's resolution: kernels of their own are for these.
constexpr int FEW = 8;
constexpr int FACTOR = 4;  // between the detector's two resolutions

constexpr double EPSILON = 1e-5;  // of every normalization in the network

// exp for x <= 88, relative error below 2e-7.
inline Lanes exponential(Lanes x) {
  x = x > -87.0f ? x : Lanes{} - 87.0f;
  const Lanes shifted = x * 1.44269504f + TO_WHOLE;
  const Lanes n = shifted - TO_WHOLE;
  const Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Lanes p = Lanes{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const WordLanes bits = load<WordLanes>(&p) + (load<WordLanes>(&shifted) << 23);
  return load<Lanes>(&bits);
}

// log(1 + exp(x)): log1p(y) = 2 artanh(y / (2 + y)) for y = exp(-|x|) in (0, 1]
inline Lanes softplus(Lanes x) {
  const Lanes positive = x > 0.0f ? x : Lanes{};
  const Lanes y = exponential(x - 2.0f * positive);
  const Lanes t = y / (2.0f + y);
  const Lanes t2 = t * t;
  Lanes s = Lanes{} + 1.0f / 13;
  s = s * t2 + 1.0f / 11;
  s = s * t2 + 1.0f / 9;
  s = s * t2 + 1.0f / 7;
  s = s * t2 + 1.0f / 5;
  s = s * t2 + 1.0f / 3;
  s = s * t2 + 1.0f;
  return positive + 2.0f * t * s;
}

// The same for |x| <= 2: x / 2 + log(2 cosh(x / 2)), a Chebyshev fit in x^2, error below 2e-8.
// V: a number or a vector.
template <typename V>
inline V softplus_near_zero(V x) {
  const V t = x * x;
  V s = V{} - 6.188382273e-08f;
  s = s * t + 1.622502991e-06f;
  s = s * t - 2.510604315e-05f;
  s = s * t + 3.455863666e-04f;
  s = s * t - 5.207281378e-03f;
  s = s * t + 1.249997417e-01f;
  s = s * t + 6.931471911e-01f;
  return 0.5f * x + s;
}

inline Lanes elu(Lanes x) { return x > 0.0f ? x : exponential(x) - 1.0f; }

// Sums of x and x^2 of every channel. Threads keep their own and are added up in their order, so
// that two runs give the same bits.
struct Totals {
  const int channels;
  std::vector<double> parts;

  Totals(int channels, int threads) : channels(channels), parts(size_t(threads) * 2 * channels) {}

  // Adds a row's sums to this thread's totals and clears them.
  void add(std::vector<float> &sum, std::vector<float> &square) {
    double *part = parts.data() + size_t(omp_get_thread_num()) * 2 * channels;
    for (int c = 0; c < channels; c++) {
      part[c] += sum[c];
      part[channels + c] += square[c];
    }
    std::fill(sum.begin(), sum.end(), 0.0f);
    std::fill(square.begin(), square.end(), 0.0f);
  }

  void write(double *totals) const {
    std::fill(totals, totals + 2 * channels, 0.0);
    for (size_t k = 0; k < parts.size(); k++) totals[k % (2 * channels)] += parts[k];
  }
};

// Group or instance normalization as a scale and a shift of each channel, from its sums.
struct Affine {
  std::vector<float> scale, shift;

  Affine(const double *totals, long pixels, int channels, int groups, const float *weight,
         const float *bias)
      : scale(channels), shift(channels) {
    const int members = channels / groups;
    for (int g = 0; g < groups; g++) {
      double sum = 0, square = 0;
      for (int c = g * members; c < (g + 1) * members; c++) {
        sum += totals[c];
        square += totals[channels + c];
      }
      const double count = double(pixels) * members, mean = sum / count;
      const double variance = std::max(square / count - mean * mean, 0.0);
      for (int c = g * members; c < (g + 1) * members; c++) {
        scale[c] = float(weight[c] / std::sqrt(variance + EPSILON));
        shift[c] = float(bias[c] - mean * scale[c]);
      }
    }
  }
};

// Where a pixel of the upsampled map lies on the small one: two neighbours and the second's weight.
struct Position {
  int first, second;
  float weight;
};

inline Position locate(int pixel, int factor, int size) {
  float at = std::max((pixel + 0.5f) / factor - 0.5f, 0.0f);
  int first = std::min(int(at), size - 1);
  return {first, std::min(first + 1, size - 1), at - first};
}

template <typename T>
void channel_sums(const T *x, long rows, int columns, int channels, double *totals, int threads) {
  Totals all(channels, threads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> sums(channels), squares(channels);
    float *__restrict sum = sums.data(), *__restrict square = squares.data();
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row++) {
      for (int column = 0; column < columns; column++) {
        const T *p = x + (row * columns + column) * channels;
#pragma omp simd
        for (int c = 0; c < channels; c++) {
          float v = read(p[c]);
          sum[c] += v;
          square[c] += v * v;
        }
      }
      all.add(sums, squares);
    }
  }
  all.write(totals);
}

// ADDS: the result is added to what is there.
template <typename T, typename Out = T, bool ADDS = false>
void upsampled_sum(const T *z, int height, int width, int factor, int channels, Out *out,
                   double *totals, int threads) {
  const int H = height * factor, W = width * factor, C = channels;
  const long stride = 9 * C;
  std::vector<Position> across(W);
  for (int x = 0; x < W; x++) across[x] = locate(x, factor, width);
  Totals all(C, threads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> sums(C), squares(C);
    float *__restrict sum = sums.data(), *__restrict square = squares.data();
    std::vector<float> line(size_t(width) * 3 * C);  // three vertical taps summed, one per dx
    std::vector<float> pixel(C), nothing(C, 0.0f);
#pragma omp for schedule(static)
    for (int y = 0; y < H; y++) {
      const T *from[6];
      float weight[6];
      for (int dy = 0; dy < 3; dy++) {
        int inside = y + dy - 1 >= 0 && y + dy - 1 < H;  // zero padding of the convolution
        Position p = locate(std::clamp(y + dy - 1, 0, H - 1), factor, height);
        from[2 * dy] = z + long(p.first) * width * stride + dy * 3 * C;
        from[2 * dy + 1] = z + long(p.second) * width * stride + dy * 3 * C;
        weight[2 * dy] = inside ? 1.0f - p.weight : 0.0f;
        weight[2 * dy + 1] = inside ? p.weight : 0.0f;
      }
      for (int x = 0; x < width; x++) {
        float *__restrict to = line.data() + long(x) * 3 * C;
        const T *a = from[0] + x * stride, *b = from[1] + x * stride, *c = from[2] + x * stride;
        const T *d = from[3] + x * stride, *e = from[4] + x * stride, *f = from[5] + x * stride;
#pragma omp simd
        for (int k = 0; k < 3 * C; k++)
          to[k] = weight[0] * read(a[k]) + weight[1] * read(b[k]) + weight[2] * read(c[k]) +
                  weight[3] * read(d[k]) + weight[4] * read(e[k]) + weight[5] * read(f[k]);
      }
      for (int x = 0; x < W; x++) {
        // a tap that falls outside reads a row of zeros
        const float *tap[6];
        float share[6];
        for (int dx = 0; dx < 3; dx++) {
          int at = x + dx - 1;
          bool inside = at >= 0 && at < W;
          Position p = across[std::clamp(at, 0, W - 1)];
          tap[2 * dx] = inside ? line.data() + (long(p.first) * 3 + dx) * C : nothing.data();
          tap[2 * dx + 1] = inside ? line.data() + (long(p.second) * 3 + dx) * C : nothing.data();
          share[2 * dx] = 1.0f - p.weight;
          share[2 * dx + 1] = p.weight;
        }
        float *__restrict value = pixel.data();
#pragma omp simd
        for (int k = 0; k < C; k++)
          value[k] = share[0] * tap[0][k] + share[1] * tap[1][k] + share[2] * tap[2][k] +
                     share[3] * tap[3][k] + share[4] * tap[4][k] + share[5] * tap[5][k];
        Out *__restrict to = out + (long(y) * W + x) * C;
        if (ADDS)
          for (int k = 0; k < C; k++) value[k] += read(to[k]);
        for (int k = 0; k < C; k++) {
          sum[k] += value[k];
          square[k] += value[k] * value[k];
        }
        for (int k = 0; k < C; k++) write(to[k], value[k]);
      }
      all.add(sums, squares);
    }
  }
  all.write(totals);
}

// Bilinear upsampling of a map, row by row, down first.
template <typename T>
class Upsampling {
 public:
  Upsampling(const T *x, int height, int width, int factor, int channels)
      : x(x), height(height), factor(factor), channels(channels), length(long(width) * channels),
        across(width * factor) {
    for (int column = 0; column < width * factor; column++)
      across[column] = locate(column, factor, width);
  }

  // Space for a row.
  std::vector<float> line() const { return std::vector<float>(length); }

  // Calls pixel(column, left, right, weight) for the pixels of a row: the two places that it lies
  // between, and the weight of the second.
  template <typename Pixel>
  void row(int y, std::vector<float> &line, Pixel pixel) const {
    const Position down = locate(y, factor, height);
    const T *above = x + down.first * length, *below = x + down.second * length;
    float *__restrict between = line.data();
#pragma omp simd
    for (long k = 0; k < length; k++)
      between[k] = (1.0f - down.weight) * read(above[k]) + down.weight * read(below[k]);
    for (int column = 0; column < int(across.size()); column++) {
      const Position p = across[column];
      pixel(column, between + long(p.first) * channels, between + long(p.second) * channels,
            p.weight);
    }
  }

 private:
  const T *x;
  const int height, factor, channels;
  const long length;
  std::vector<Position> across;
};

// `upsampled_sum` for a 1x1 convolution: its result upsampled.
template <typename T, typename Out = T, bool ADDS = false>
void upsampled(const T *x, int height, int width, int factor, int channels, Out *out,
               double *totals, int threads) {
  const int H = height * factor, W = width * factor, C = channels;
  const Upsampling<T> upsampling(x, height, width, factor, C);
  Totals all(C, threads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> sums(C), squares(C), line = upsampling.line();
    float *__restrict sum = sums.data(), *__restrict square = squares.data();
#pragma omp for schedule(static)
    for (int y = 0; y < H; y++) {
      upsampling.row(y, line, [&](int column, const float *left, const float *right, float weight) {
        Out *__restrict to = out + (long(y) * W + column) * C;
#pragma omp simd
        for (int c = 0; c < C; c++) {
          float value = (1.0f - weight) * left[c] + weight * right[c];
          if (ADDS) value += read(to[c]);
          sum[c] += value;
          square[c] += value * value;
          write(to[c], value);
        }
      });
      all.add(sums, squares);
    }
  }
  all.write(totals);
}

// Of an axis that is upsampled, by the small map's places: in how many pixels a value has a part, and
// the sum of the upsampled values' squares as one of the values' own squares and of products of
// neighbours, of which each counts twice.
struct Parts {
  std::vector<float> alone, squared, with_next;

  Parts(int size, int factor) : alone(size), squared(size), with_next(size) {
    for (int pixel = 0; pixel < size * factor; pixel++) {
      const Position p = locate(pixel, factor, size);
      const float first = p.second == p.first ? 1.0f : 1.0f - p.weight, second = 1.0f - first;
      alone[p.first] += first;
      alone[p.second] += second;
      squared[p.first] += first * first;
      squared[p.second] += second * second;
      with_next[p.first] += first * second;
    }
  }
};

// The statistics of a map that is upsampled, without upsampling it.
template <typename T>
void upsampled_sums(const T *x, int height, int width, int factor, int channels, double *totals,
                    int threads) {
  const Parts down(height, factor), across(width, factor);
  const int C = channels;
  Totals all(C, threads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> sums(C), squares(C);
    float *__restrict sum = sums.data(), *__restrict square = squares.data();
#pragma omp for schedule(static)
    for (int y = 0; y < height; y++) {
      const T *row = x + long(y) * width * C, *next = y + 1 < height ? row + long(width) * C : row;
      const float here = down.squared[y], below = 2 * down.with_next[y];
      for (int column = 0; column < width; column++) {
        const long right = column + 1 < width ? C : 0;  // the last has no part with the next
        const T *p = row + long(column) * C, *q = next + long(column) * C;
        const float alone = down.alone[y] * across.alone[column];
        const float squared = across.squared[column], with_next = across.with_next[column];
#pragma omp simd
        for (int c = 0; c < C; c++) {
          const float v = read(p[c]), v_right = read(p[c + right]);
          const float v_below = read(q[c]), v_across = read(q[c + right]);
          sum[c] += alone * v;
          square[c] += here * v * (squared * v + 2 * with_next * v_right) +
                       below * (squared * v * v_below + with_next * (v * v_across + v_right * v_below));
        }
      }
      all.add(sums, squares);
    }
  }
  all.write(totals);
}

// ELU of x upsampled and normalized, to pixels `stride` apart.
template <typename T>
void upsampled_elu(const T *x, int height, int width, int factor, int channels,
                   const double *statistics, int groups, const float *weight, const float *bias,
                   T *out, long stride, int threads) {
  const int H = height * factor, W = width * factor, C = channels;
  const Affine norm(statistics, long(H) * W, channels, groups, weight, bias);
  const float *scale = norm.scale.data(), *shift = norm.shift.data();
  const Upsampling<T> upsampling(x, height, width, factor, C);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> line = upsampling.line();
#pragma omp for schedule(static)
    for (int y = 0; y < H; y++)
      upsampling.row(y, line, [&](int column, const float *left, const float *right, float share) {
        T *to = out + (long(y) * W + column) * stride;
        by_lanes(C, [=](long c, auto lanes) {
          const Lanes value = (1.0f - share) * lanes.read(left + c) + share * lanes.read(right + c);
          lanes.write(to + c, elu(value * lanes.read(scale + c) + lanes.read(shift + c)));
        });
      });
  }
}

// y = activation(x * scale + shift): ELU, or PReLU with a slope, which training may make negative.
template <typename T>
void activate(const T *x, long count, const float *scale, const float *shift, bool is_elu,
              float slope, T *out) {
  by_lanes(count, [=](long c, auto lanes) {
    const Lanes v = lanes.read(x + c) * lanes.read(scale + c) + lanes.read(shift + c);
    lanes.write(out + c, is_elu ? elu(v) : v > 0.0f ? v : slope * v);
  });
}

template <typename T>
void normalize_activate(const T *x, long pixels, int channels, const double *statistics, int groups,
                        const float *weight, const float *bias, bool is_elu, float slope, T *out,
                        long stride, int threads) {
  const Affine norm(statistics, pixels, channels, groups, weight, bias);
  // where pixels lie close together in both maps, many are one long loop
  const long group = stride == channels ? std::max(256 / channels, 1) : 1;
  std::vector<float> scales(group * channels), shifts(group * channels);
  for (long k = 0; k < group * channels; k++) {
    scales[k] = norm.scale[k % channels];
    shifts[k] = norm.shift[k % channels];
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < pixels; i += group)
    activate(x + i * channels, std::min(group, pixels - i) * channels, scales.data(), shifts.data(),
             is_elu, slope, out + i * stride);
}

// Cross normalization's factor and offset of each pixel of a row, from the channel means about it.
// `means` is at the row's first pixel, with three zeros about the map and slack beyond, its rows
// `pitch` apart; weights are (2, 7, 7).
inline void convolve_means(const float *means, long pitch, int width, const float *weights,
                           const float *bias, float *factor, float *offset) {
  for (int x = 0; x < width; x += LANES) {
    Lanes sum[2] = {Lanes{} + bias[0], Lanes{} + bias[1]};
    for (int tap = 0; tap < 49; tap++) {
      const Lanes value = load<Lanes>(means + (tap / 7 - 3) * pitch + x + tap % 7 - 3);
      sum[0] += weights[tap] * value;
      sum[1] += weights[49 + tap] * value;
    }
    store(factor + x, sum[0]);
    store(offset + x, sum[1]);
  }
}

// F_cn, the reliability, and the mean over F_cn and the stem's map beside each other at each pixel;
// and the largest magnitude in both.
template <typename T>
void bridge(const T *x, const T *stem, int height, int width, int channels, int stem_channels,
            const float *spatial, const float *spatial_bias, const float *weight,
            const float *bias, const float *direction, const float *direction_bias,
            float *bridged, float *maps_mean, float *reliability, float *largest, int threads) {
  const long pitch = width + 6 + LANES;  // vectors reach over the end of a row
  std::vector<float> means((height + 6) * pitch + LANES);
  const auto mean_row = [&](int y) { return means.data() + (y + 3) * pitch + 3; };
  const auto inverse_deviation = space<float>(long(height) * width);
  std::unique_ptr<const Affine> norm;
  Totals all(channels, threads);
  float most = 0;
#pragma omp parallel num_threads(threads) reduction(max : most)
  {
    std::vector<float> sums(channels), squares(channels);
    float *__restrict sum = sums.data(), *__restrict square = squares.data();
#pragma omp for schedule(static)
    for (int y = 0; y < height; y++) {
      for (int column = 0; column < width; column++) {
        const long i = long(y) * width + column;
        const T *p = x + i * channels;
        float total = 0, spread = 0;
#pragma omp simd reduction(+ : total)
        for (int c = 0; c < channels; c++) {
          float v = read(p[c]);
          total += v;
          sum[c] += v;
          square[c] += v * v;
        }
        const float m = total / channels;
#pragma omp simd reduction(+ : spread)
        for (int c = 0; c < channels; c++) {
          float v = read(p[c]) - m;
          spread += v * v;
        }
        mean_row(y)[column] = m;
        inverse_deviation[i] = 1.0f / std::sqrt(spread / channels + float(EPSILON));
      }
      all.add(sums, squares);
    }
#pragma omp single
    {
      std::vector<double> totals(2 * channels);
      all.write(totals.data());
      norm.reset(new Affine(totals.data(), long(height) * width, channels, channels, weight, bias));
    }
    const float *scale = norm->scale.data(), *shift = norm->shift.data();
    std::vector<float> factor(width + LANES), offset(width + LANES);
#pragma omp for schedule(static)
    for (int y = 0; y < height; y++) {
      convolve_means(mean_row(y), pitch, width, spatial, spatial_bias, factor.data(),
                     offset.data());
      for (int column = 0; column < width; column++) {
        const long i = long(y) * width + column;
        const T *p = x + i * channels, *q = stem + i * stem_channels;
        float *__restrict to = bridged + i * channels;
        const float a = factor[column] * inverse_deviation[i];
        const float b = offset[column] - mean_row(y)[column] * a;
        float total = 0, peak = 0, squared = 0, along = 0;
#pragma omp simd reduction(+ : total, squared, along) reduction(max : peak)
        for (int c = 0; c < channels; c++) {
          float v = read(p[c]) * (a + scale[c]) + (b + shift[c]);
          to[c] = v;
          total += v;
          squared += v * v;
          along += v * direction[c];
          peak = std::max(peak, std::fabs(v));
        }
        reliability[i] = std::exp(along / std::max(std::sqrt(squared), 1e-12f) + *direction_bias);
#pragma omp simd reduction(+ : total) reduction(max : peak)
        for (int c = 0; c < stem_channels; c++) {
          float v = read(q[c]);
          total += v;
          peak = std::max(peak, std::fabs(v));
        }
        maps_mean[i] = total / (channels + stem_channels);
        most = std::max(most, peak);
      }
    }
  }
  *largest = most;
}

// What brings values to magnitudes of at most 1, from the largest.
inline float to_unit(const float *largest) { return 1.0f / std::max(*largest, 1e-6f); }

inline int reflect(int i, int size) { return i < 0 ? 1 : i >= size ? size - 2 : i; }

// One of the maps that lie beside each other, as a row of it is weighed.
template <typename T>
class PeakyRow {
 public:
  PeakyRow(const T *map, int height, int width, int channels)
      : map(map), height(height), width(width), channels(channels),
        sums(long(width) * channels) {}

  // Goes to a row.
  void start(int y) {
    const long length = long(width) * channels;
    const T *above = map + reflect(y - 1, height) * length;
    const T *below = map + reflect(y + 1, height) * length;
    here = map + y * length;
    float *__restrict to = sums.data();
#pragma omp simd
    for (long k = 0; k < length; k++) to[k] = read(above[k]) + read(here[k]) + read(below[k]);
  }

  // The largest of `best` and the products of both scores of Eq. 4-6, at a pixel with this channel
  // mean.
  Lanes score(int x, float mean, float scale, Lanes best) const {
    const float *left = sums.data() + reflect(x - 1, width) * long(channels);
    const float *middle = sums.data() + x * long(channels);
    const float *right = sums.data() + reflect(x + 1, width) * long(channels);
    const T *value = here + x * long(channels);
    by_lanes(channels, [&](long c, auto lanes) {
      const Lanes v = lanes.read(value + c);
      const Lanes sum = lanes.read(left + c) + lanes.read(middle + c) + lanes.read(right + c);
      // |value| * scale <= 1, and so for every mean
      const Lanes product = softplus_near_zero((v - mean) * scale) *
                            softplus_near_zero((v - sum * (1.0f / 9)) * scale);
      best = lanes.only(product) > best ? product : best;
    });
    return best;
  }

  template <typename S>
  void weigh(int x, float weight, S *to) const {
    const T *value = here + x * long(channels);
    by_lanes(channels, [=](long c, auto lanes) {
      lanes.write(to + c, weight * lanes.read(value + c));
    });
  }

 private:
  const T *map, *here = nullptr;
  const int height, width, channels;
  std::vector<float> sums;  // of three rows
};

// Peakiness of F_cn and the stem's map beside each other, and both maps times it.
template <typename T>
void weigh_by_peakiness(const float *bridged, const T *stem, const float *mean,
                        const float *largest, int height, int width, int channels,
                        int stem_channels, float *peaks, T *out, int threads) {
  const int all = channels + stem_channels;
  const float scale = to_unit(largest);
#pragma omp parallel num_threads(threads)
  {
    PeakyRow<float> first(bridged, height, width, channels);
    PeakyRow<T> second(stem, height, width, stem_channels);
#pragma omp for schedule(static)
    for (int y = 0; y < height; y++) {
      first.start(y);
      second.start(y);
      for (int x = 0; x < width; x++) {
        const long pixel = long(y) * width + x;
        const float best = largest_lane(
            second.score(x, mean[pixel], scale, first.score(x, mean[pixel], scale, Lanes{})));
        peaks[pixel] = best;
        first.weigh(x, best, out + pixel * all);
        second.weigh(x, best, out + pixel * all + channels);
      }
    }
  }
}

// RGB, bytes or floats in [0, 1] -> normalized planes, and the largest magnitude.
template <typename S>
void normalize_image(const S *image, long pixels, const float *mean, const float *deviation,
                     float *planes, float *largest, int threads) {
  constexpr float UNIT = std::is_floating_point_v<S> ? 1 : 255;
  float most = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(max : most)
  for (long block = 0; block < pixels; block += 4096) {
    const long end = std::min(block + 4096, pixels);
    for (int c = 0; c < 3; c++) {
      const float m = UNIT * mean[c], f = 1.0f / (UNIT * deviation[c]);
      float *plane = planes + c * pixels, peak = 0;
#pragma omp simd reduction(max : peak)
      for (long i = block; i < end; i++) {
        float v = (image[3 * i + c] - m) * f;
        plane[i] = v;
        peak = std::max(peak, std::fabs(v));
      }
      most = std::max(most, peak);
    }
  }
  *largest = most;
}

// One row of the image: its peakiness to `peaks`, and the three lines times it to `out`, `pitch`
// apart. `sums` is space for three lines.
void weigh_row(const float *planes, float scale, int y, int height, int width, float *sums,
               float *__restrict peaks, float *out, int pitch) {
  const long pixels = long(height) * width;
  const float *here[3];
  for (int c = 0; c < 3; c++) {
    const float *plane = planes + c * pixels;
    const float *above = plane + reflect(y - 1, height) * long(width);
    const float *below = plane + reflect(y + 1, height) * long(width);
    here[c] = plane + long(y) * width;
    float *__restrict sum = sums + size_t(c) * (width + 2);
    for (int x = 0; x < width; x++) sum[x + 1] = above[x] + here[c][x] + below[x];
    sum[0] = sum[2];
    sum[width + 1] = sum[width - 1];
  }
  const float *r = here[0], *g = here[1], *b = here[2];
  const float *sr = sums, *sg = sr + width + 2, *sb = sg + width + 2;
#pragma omp simd
  for (int x = 0; x < width; x++) {
    float mean = (r[x] + g[x] + b[x]) * (1.0f / 3);
    float lr = (sr[x] + sr[x + 1] + sr[x + 2]) * (1.0f / 9);
    float lg = (sg[x] + sg[x + 1] + sg[x + 2]) * (1.0f / 9);
    float lb = (sb[x] + sb[x + 1] + sb[x + 2]) * (1.0f / 9);
    // |value| * scale <= 1, and so for every mean
    float pr = softplus_near_zero((r[x] - mean) * scale) * softplus_near_zero((r[x] - lr) * scale);
    float pg = softplus_near_zero((g[x] - mean) * scale) * softplus_near_zero((g[x] - lg) * scale);
    float pb = softplus_near_zero((b[x] - mean) * scale) * softplus_near_zero((b[x] - lb) * scale);
    peaks[x] = std::max(pr, std::max(pg, pb));
  }
  for (int c = 0; c < 3; c++) {
    const float *from = here[c];
    float *__restrict to = out + c * pitch;
    for (int x = 0; x < width; x++) to[x] = peaks[x] * from[x];
  }
}

template <typename T>
void weigh_image_by_peakiness(const float *planes, const float *largest, int height, int width,
                              float *peaks, T *out, int threads) {
  const float scale = to_unit(largest);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> sums(3 * size_t(width + 2)), weighted(3 * size_t(width));
#pragma omp for schedule(static)
    for (int y = 0; y < height; y++) {
      weigh_row(planes, scale, y, height, width, sums.data(), peaks + long(y) * width,
                weighted.data(), width);
      T *to = out + 3 * long(y) * width;
      for (int x = 0; x < width; x++)
        for (int c = 0; c < 3; c++) write(to[3 * x + c], weighted[c * width + x]);
    }
  }
}

// The rows of a thread, and three rows of lines around the one that is worked on, with zeros at
// both ends: what a 3x3 convolution reads.
template <int LINES>
struct Window {
  static constexpr int SLACK = 64;  // floats that vectors may read beyond a line
  const int height, width, pitch;
  std::vector<float> space;

  Window(int height, int width)
      : height(height), width(width), pitch(width + 1 + SLACK), space(3 * LINES * pitch) {}

  // The place of a row's first line; one column of zeros lies before it.
  float *row(int y) { return space.data() + long((y + 3) % 3) * LINES * pitch + 1; }

  // Calls fill(y, row) for each row as it comes into the window, outside of the image zeros do.
  // Then calls use(y) for every row from `begin` to `end`.
  template <typename Fill, typename Use>
  void slide(int begin, int end, Fill fill, Use use) {
    auto enter = [&](int y) {
      if (y >= 0 && y < height) return fill(y, row(y));
      for (int c = 0; c < LINES; c++) std::fill_n(row(y) + c * pitch, width, 0.0f);
    };
    if (begin >= end) return;
    enter(begin - 1);
    enter(begin);
    for (int y = begin; y < end; y++) {
      enter(y + 1);
      use(y);
    }
  }
};

constexpr int VECTORS = REGISTERS == 32 ? 2 : 1;  // of sums for each channel in `convolve_row`

// 3x3 convolution of a window's middle row to few channels, to the lines of `out`, `width` apart;
// libraries leave most of the vector units idle here. Weights are (LINES, 3, 3, FEW). To the result
// are added the lines of `plus`, `pitch` apart, which may be null.
template <int LINES>
void convolve_row(Window<LINES> &window, int y, const float *weights, const float *plus, int pitch,
                  float *out) {
  constexpr int STEP = LANES * VECTORS;
  const int width = window.width;
  const float *rows[3] = {window.row(y - 1) - 1, window.row(y) - 1, window.row(y + 1) - 1};
  for (int x = 0; x < width; x += STEP) {
    Lanes sum[FEW][VECTORS] = {};
    for (int c = 0; c < LINES; c++)
      for (int dy = 0; dy < 3; dy++)
        for (int dx = 0; dx < 3; dx++) {
          const float *from = rows[dy] + c * window.pitch + x + dx;
          const float *weight = weights + ((c * 3 + dy) * 3 + dx) * FEW;
          for (int v = 0; v < VECTORS; v++) {
            const Lanes value = load<Lanes>(from + v * LANES);
            for (int o = 0; o < FEW; o++) sum[o][v] += weight[o] * value;
          }
        }
    // a value at a time and unrolled, so that the sums stay in registers
#pragma GCC unroll 8
    for (int o = 0; o < FEW; o++)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) {
        const int left = width - x - v * LANES;
        if (left <= 0) continue;
        float *to = out + long(o) * width + x + v * LANES;
        Lanes value = sum[o][v];
        if (plus) value += load<Lanes>(plus + long(o) * pitch + x + v * LANES);
        if (left >= LANES)
          store(to, value);
        else
          std::memcpy(to, &value, left * sizeof(float));
      }
  }
}

inline void add_lines(const float *lines, int width, std::vector<float> &sums,
                      std::vector<float> &squares) {
  for (int c = 0; c < FEW; c++) {
    const float *line = lines + long(c) * width;
    float sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
    for (int x = 0; x < width; x++) {
      sum += line[x];
      square += line[x] * line[x];
    }
    sums[c] += sum;
    squares[c] += square;
  }
}

// The first and the last row of this thread.
inline std::pair<int, int> share(int rows) {
  const long thread = omp_get_thread_num(), threads = omp_get_num_threads();
  return {int(rows * thread / threads), int(rows * (thread + 1) / threads)};
}

// Rows of a 1x1 convolution of a small map to few channels, as lines.
template <typename T>
struct SmallRows {
  static constexpr int KEPT = 2;  // rows of the small map around a row of the large one
  const T *const map;
  const float *const weights;  // (channels, FEW)
  const int width, channels;
  int rows[KEPT] = {-1, -1};
  std::vector<float> space;

  SmallRows(const T *map, const float *weights, int width, int channels)
      : map(map), weights(weights), width(width), channels(channels),
        space(KEPT * FEW * size_t(width)) {}

  // FEW lines of a row, `width` apart.
  const float *row(int y) {
    float *to = space.data() + long(y % KEPT) * FEW * width;
    if (rows[y % KEPT] == y) return to;
    rows[y % KEPT] = y;
    for (int x = 0; x < width; x++) {
      const T *from = map + (long(y) * width + x) * channels;
      float sum[FEW] = {};
      for (int k = 0; k < channels; k++)
        for (int c = 0; c < FEW; c++) sum[c] += weights[k * FEW + c] * read(from[k]);
      for (int c = 0; c < FEW; c++) to[c * width + x] = sum[c];
    }
    return to;
  }
};

// Layer_1 of the head without its normalization: the image branch, normalized and activated while
// it is read, convolved, plus the left branch, convolved by 1x1 and upsampled.
template <typename T>
void hidden(const float *right, const double *statistics, int groups, const float *weight,
            const float *bias, float slope, const float *weights, const T *left, int height,
            int width, int channels, const float *left_weights, float *out, double *totals,
            int threads) {
  const int H = height * FACTOR, W = width * FACTOR;
  const Affine norm(statistics, long(H) * W, FEW, groups, weight, bias);
  static_assert(FACTOR == 4);  // shares of two cells in the pixels between their centres
  constexpr float first[] = {0.875f, 0.625f, 0.375f, 0.125f};
  constexpr float second[] = {0.125f, 0.375f, 0.625f, 0.875f};
  Totals all(FEW, threads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> sums(FEW), squares(FEW);
    Window<FEW> window(H, W);
    SmallRows<T> small(left, left_weights, width, channels);
    const int pitch = W + FACTOR + LANES * VECTORS;  // vectors are read over the end
    std::vector<float> cells(width + 2), wide(FEW * pitch);
    auto activate = [&](int y, float *row) {
      for (int c = 0; c < FEW; c++) {
        const float *from = right + (long(y) * FEW + c) * W;
        float *__restrict to = row + c * window.pitch;
        const float factor = norm.scale[c], offset = norm.shift[c], negative = slope;
#pragma omp simd
        for (int x = 0; x < W; x++) {
          float v = from[x] * factor + offset;
          to[x] = v > 0 ? v : negative * v;
        }
      }
    };
    auto upsample = [&](int y) {
      const Position down = locate(y, FACTOR, height);
      const float *above = small.row(down.first), *below = small.row(down.second);
      for (int c = 0; c < FEW; c++) {
        // a line of cells, with the outer ones repeated at both ends
        float *__restrict cell = cells.data();
        for (int x = 0; x < width; x++)
          cell[x + 1] = (1.0f - down.weight) * above[c * width + x] +
                        down.weight * below[c * width + x];
        cell[0] = cell[1];
        cell[width + 1] = cell[width];
        float *__restrict between = wide.data() + c * pitch;
        for (int i = 0; i <= width; i++)
          for (int pixel = 0; pixel < FACTOR; pixel++)
            between[i * FACTOR + pixel] = first[pixel] * cell[i] + second[pixel] * cell[i + 1];
      }
    };
    const auto [begin, end] = share(H);
    window.slide(begin, end, activate, [&](int y) {
      float *to = out + long(y) * FEW * W;
      upsample(y);
      // two pixels lie before the first cell's centre
      convolve_row(window, y, weights, wide.data() + FACTOR / 2, pitch, to);
      add_lines(to, W, sums, squares);
      all.add(sums, squares);
    });
  }
  all.write(totals);
}

// InstanceNorm, PReLU and the 1x1 convolution to one channel; sums of the result for what follows.
template <typename T>
void response(const T *x, long rows, int columns, int channels, const double *statistics,
              int groups, const float *norm_weight, const float *norm_bias, float slope,
              const float *weight, float *out, double *totals, int threads) {
  const int C = channels;
  const Affine norm(statistics, rows * columns, channels, groups, norm_weight, norm_bias);
  const float *scale = norm.scale.data(), *shift = norm.shift.data();
  Totals all(1, threads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> sums(1), squares(1);
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row++) {
      float *to = out + row * columns;
      for (int column = 0; column < columns; column++) {
        const T *p = x + (row * columns + column) * C;
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int c = 0; c < C; c++) {
          float v = read(p[c]) * scale[c] + shift[c];
          total += (v > 0 ? v : slope * v) * weight[c];
        }
        to[column] = total;
      }
      float sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
      for (int column = 0; column < columns; column++) {
        sum += to[column];
        square += to[column] * to[column];
      }
      sums[0] = sum;
      squares[0] = square;
      all.add(sums, squares);
    }
  }
  all.write(totals);
}

// Peakiness of the image, and Layer_0 of the image times it, without its normalization.
void image_branch(const float *planes, const float *largest, int height, int width,
                  const float *weights, float *peaks, float *out, double *totals, int threads) {
  const float scale = to_unit(largest);
  Totals all(FEW, threads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> sums(FEW), squares(FEW), space(3 * size_t(width + 2)), beside(width);
    Window<3> window(height, width);
    const auto [begin, end] = share(height);
    window.slide(
        begin, end,
        [&, begin = begin, end = end](int y, float *row) {
          // neighbours of this thread's rows are another thread's to write
          float *to = y >= begin && y < end ? peaks + long(y) * width : beside.data();
          weigh_row(planes, scale, y, height, width, space.data(), to, row, window.pitch);
        },
        [&](int y) {
          float *to = out + long(y) * FEW * width;
          convolve_row(window, y, weights, nullptr, 0, to);
          add_lines(to, width, sums, squares);
          all.add(sums, squares);
        });
  }
  all.write(totals);
}

// `response` for maps of few channels, which are lines.
void response_of_lines(const float *x, int height, int width, const double *statistics, int groups,
                       const float *norm_weight, const float *norm_bias, float slope,
                       const float *weight, float *out, double *totals, int threads) {
  const Affine norm(statistics, long(height) * width, FEW, groups, norm_weight, norm_bias);
  const float *scale = norm.scale.data(), *shift = norm.shift.data();
  Totals all(1, threads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> sums(1), squares(1);
#pragma omp for schedule(static)
    for (int y = 0; y < height; y++) {
      const float *lines = x + long(y) * FEW * width;
      float *__restrict to = out + long(y) * width;
      float sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
      for (int column = 0; column < width; column++) {
        float total = 0;
        for (int c = 0; c < FEW; c++) {
          float v = lines[c * width + column] * scale[c] + shift[c];
          total += (v > 0 ? v : slope * v) * weight[c];
        }
        to[column] = total;
        sum += total;
        square += total * total;
      }
      sums[0] = sum;
      squares[0] = square;
      all.add(sums, squares);
    }
  }
  all.write(totals);
}

// upsample(left peaks * reliability) * right peaks * softplus(response normalized), in place of the
// response.
void score(float *values, const double *statistics, const float *weight, const float *bias,
           const float *left, const float *reliability, const float *right, int height, int width,
           int factor, int threads) {
  const int H = height * factor, W = width * factor;
  const Affine norm(statistics, long(H) * W, 1, 1, weight, bias);
  const float scale = norm.scale[0], shift = norm.shift[0];
  std::vector<Position> across(W);
  for (int x = 0; x < W; x++) across[x] = locate(x, factor, width);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> line(width), wide(W);
#pragma omp for schedule(static)
    for (int y = 0; y < H; y++) {
      const Position p = locate(y, factor, height);
      const long first = long(p.first) * width, second = long(p.second) * width;
      for (int x = 0; x < width; x++) {
        const float above = left[first + x] * reliability[first + x];
        line[x] = above + p.weight * (left[second + x] * reliability[second + x] - above);
      }
      for (int x = 0; x < W; x++)
        wide[x] = line[across[x].first] +
                  across[x].weight * (line[across[x].second] - line[across[x].first]);
      float *to = values + long(y) * W;
      const float *peaks = right + long(y) * W;
      const float *left_peaks = wide.data();
      by_lanes(W, [=](long x, auto lanes) {
        const Lanes value = softplus(lanes.read(to + x) * scale + shift);
        lanes.write(to + x, lanes.read(left_peaks + x) * lanes.read(peaks + x) * value);
      });
    }
  }
}

}  // namespace

EXPORT_TYPES(channel_sums)
EXPORT_TYPES(upsampled_sum)
EXPORT(add_upsampled_sum_float, upsampled_sum<float, float, true>)
EXPORT(add_upsampled_sum_bfloat16, upsampled_sum<bfloat16, float, true>)
EXPORT_TYPES(upsampled)
EXPORT(add_upsampled_float, upsampled<float, float, true>)
EXPORT(add_upsampled_bfloat16, upsampled<bfloat16, float, true>)
EXPORT_TYPES(upsampled_sums)
EXPORT_TYPES(upsampled_elu)
EXPORT_TYPES(normalize_activate)
EXPORT_TYPES(bridge)
EXPORT_TYPES(weigh_by_peakiness)
EXPORT_TYPES(weigh_image_by_peakiness)
EXPORT_TYPES(hidden)
EXPORT_TYPES(response)
EXPORT(normalize_bytes, normalize_image<uint8_t>)
EXPORT(normalize_floats, normalize_image<float>)
EXPORT(image_branch, image_branch)
EXPORT(response_of_lines, response_of_lines)
EXPORT(score, score)
