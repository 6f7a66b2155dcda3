// From the score map to keypoints, and their descriptors out of the feature map.
//
// selection.py and sampling.py say the same in OpenCV's and PyTorch's operators.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bfloat16.h"
#include "lanes.h"

namespace {

// By the bits: the compiler is told that there are no others, and would leave the question out.
inline bool is_finite(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (bits & 0x7f800000u) != 0x7f800000u;
}

constexpr int TEXTURE_RADIUS = 2;  // of the neighbourhood that must not be of a single value

// Calls test(row, column) for the neighbours inside the image until one call is true.
template <typename Test>
bool any_neighbour(int y, int x, int radius, int height, int width, Test test) {
  for (int v = std::max(y - radius, 0); v <= std::min(y + radius, height - 1); v++)
    for (int u = std::max(x - radius, 0); u <= std::min(x + radius, width - 1); u++)
      if (test(v, u)) return true;
  return false;
}

// The four cells about a position along an axis, and their weights: linear, or a cubic B-spline's.
// The border repeats.
struct Cells {
  int at[4];
  float weight[4];

  Cells(float position, int size, bool smooth) {
    const float first = std::floor(position) - 1;
    for (int k = 0; k < 4; k++) {
      const float distance = std::fabs(first + k - position);
      const float outer = std::max(2 - distance, 0.0f), inner = std::max(1 - distance, 0.0f);
      weight[k] = smooth ? (outer * outer * outer - 4 * inner * inner * inner) / 6 : inner;
      at[k] = std::clamp(int(first) + k, 0, size - 1);
    }
  }
};

constexpr int VECTORS = 4;  // of channels that `sample` sums at a time

// Samples of a channels-last map whose pixels lie `pitch` apart: bilinear, or smooth.
template <typename T>
void sample(const T *map, int height, int width, int channels, long pitch, const float *points,
            long count, int stride, bool smooth, float *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < count; i++) {
    const Cells columns((points[2 * i] + 0.5f) / stride - 0.5f, width, smooth);
    const Cells rows((points[2 * i + 1] + 0.5f) / stride - 0.5f, height, smooth);
    const T *cell[16];
    float weight[16];
    int cells = 0;
    for (int r = 0; r < 4; r++)
      for (int c = 0; c < 4; c++) {
        weight[cells] = rows.weight[r] * columns.weight[c];
        cell[cells] = map + (long(rows.at[r]) * width + columns.at[c]) * pitch;
        cells += weight[cells] != 0;
      }
    float *to = out + i * channels;
    int k = 0;
    for (; k + VECTORS * LANES <= channels; k += VECTORS * LANES) {
      Lanes sum[VECTORS] = {};
      for (int n = 0; n < cells; n++)
        for (int v = 0; v < VECTORS; v++)
          sum[v] += weight[n] * read_lanes(cell[n] + k + v * LANES);
      for (int v = 0; v < VECTORS; v++) store(to + k + v * LANES, sum[v]);
    }
    for (; k < channels; k++) {
      to[k] = 0;
      for (int n = 0; n < cells; n++) to[k] += weight[n] * read(cell[n][k]);
    }
  }
}

// (height, width, channels) with pixels `pitch` apart -> means of blocks of side x side cells; those
// at the edge may be smaller.
template <typename T>
void block_means(const T *map, int height, int width, int channels, long pitch, int side,
                 float *out, int threads) {
  const int down = (height + side - 1) / side, across = (width + side - 1) / side;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
  for (int r = 0; r < down; r++)
    for (int c = 0; c < across; c++) {
      const int bottom = std::min((r + 1) * side, height), right = std::min((c + 1) * side, width);
      float *__restrict to = out + (long(r) * across + c) * channels;
      std::fill_n(to, channels, 0.0f);
      for (int y = r * side; y < bottom; y++)
        for (int x = c * side; x < right; x++) {
          const T *cell = map + (long(y) * width + x) * pitch;
#pragma omp simd
          for (int k = 0; k < channels; k++) to[k] += read(cell[k]);
        }
      const float share = 1.0f / ((bottom - r * side) * (right - c * side));
      for (int k = 0; k < channels; k++) to[k] *= share;
    }
}

}  // namespace

extern "C" {

// Local maxima above a threshold that are inside of the border and of the mask (or null), and in a
// neighbourhood with texture; in the order of the image. Returns how many were written to `places`
// (row * width + column). Rows of the (height, width, 3) image lie `pitch` bytes apart.
long local_maxima(const float *scores, int height, int width, int radius, float threshold,
                  int border, const uint8_t *image, long pitch, const uint8_t *mask,
                  int64_t *places, int threads) {
  std::vector<std::vector<int64_t>> found(threads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<int64_t> &mine = found[omp_get_thread_num()];
    std::vector<uint8_t> candidates(width, 1);
#pragma omp for schedule(static)
    for (int y = border; y < height - border; y++) {
      const float *row = scores + long(y) * width;
      if (radius > 0) {  // few are left of a first look at four neighbours
        const float *above = y > 0 ? row - width : row, *below = y + 1 < height ? row + width : row;
        uint8_t *__restrict candidate = candidates.data();
#pragma omp simd
        for (int x = 1; x < width - 1; x++)
          candidate[x] = (row[x] > threshold) & (row[x] >= row[x - 1]) & (row[x] >= row[x + 1]) &
                         (row[x] >= above[x]) & (row[x] >= below[x]);
      }
      for (int x = border; x < width - border; x++) {
        if (!candidates[x]) continue;
        const float value = row[x];
        if (!(value > threshold) || !is_finite(value)) continue;
        if (mask && !mask[long(y) * width + x]) continue;
        bool above_one = radius == 0;
        if (any_neighbour(y, x, radius, height, width, [&](int v, int u) {
              const float other = scores[long(v) * width + u];
              above_one |= other < value;
              return other > value;
            }))
          continue;
        const uint8_t *centre = image + y * pitch + 3 * x;
        if (above_one && any_neighbour(y, x, TEXTURE_RADIUS, height, width, [&](int v, int u) {
              return std::memcmp(image + v * pitch + 3 * u, centre, 3) != 0;
            }))
          mine.push_back(long(y) * width + x);
      }
    }
  }
  long count = 0;
  for (const auto &part : found) {
    std::copy(part.begin(), part.end(), places + count);
    count += long(part.size());
  }
  return count;
}

// Positions of places, moved to the score-weighted mean of their 3x3 neighbourhood.
void subpixel_points(const float *scores, int height, int width, const int64_t *places, long count,
                     float *points) {
  for (long i = 0; i < count; i++) {
    const int y = int(places[i] / width), x = int(places[i] % width);
    float weight[9], least = scores[places[i]];
    for (int k = 0; k < 9; k++) {  // the image's border is repeated
      const int v = std::clamp(y + k / 3 - 1, 0, height - 1);
      const int u = std::clamp(x + k % 3 - 1, 0, width - 1);
      weight[k] = scores[long(v) * width + u];
      least = std::min(least, weight[k]);
    }
    float total = 0, right = 0, down = 0;
    for (int k = 0; k < 9; k++) {
      const float w = weight[k] - least;
      total += w;
      right += w * (std::clamp(x + k % 3 - 1, 0, width - 1) - x);
      down += w * (std::clamp(y + k / 3 - 1, 0, height - 1) - y);
    }
    total = std::max(total, 1e-12f);
    points[2 * i] = x + right / total;
    points[2 * i + 1] = y + down / total;
  }
}

#define EXPORT(T)                                                                                  \
  void sample_##T(const T *map, int height, int width, int channels, long pitch,                   \
                  const float *points, long count, int stride, int smooth, float *out,             \
                  int threads) {                                                                   \
    sample(map, height, width, channels, pitch, points, count, stride, smooth, out, threads);      \
  }                                                                                                \
  void block_means_##T(const T *map, int height, int width, int channels, long pitch, int side,    \
                       float *out, int threads) {                                                  \
    block_means(map, height, width, channels, pitch, side, out, threads);                          \
  }

EXPORT(float)
EXPORT(bfloat16)
}
