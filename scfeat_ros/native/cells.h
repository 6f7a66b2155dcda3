// Smooth samples of channels-last maps at positions of the image.
#pragma once

#include <algorithm>
#include <cmath>

#include "lanes.h"

namespace {

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
  void add(const float *map, int height, int width, int channels, int stride, const float *point) {
    const Cells columns((point[0] + 0.5f) / stride - 0.5f, width);
    const Cells rows((point[1] + 0.5f) / stride - 0.5f, height);
    for (int r = 0; r < 4; r++)
      for (int c = 0; c < 4; c++) {
        weight[count] = rows.weight[r] * columns.weight[c];
        cell[count] = map + (long(rows.at[r]) * width + columns.at[c]) * channels;
        count += weight[count] != 0;
      }
  }

  // Adds it to `to`.
  void to(float *to, int channels) const {
    int k = 0;
    for (; k + VECTORS * LANES <= channels; k += VECTORS * LANES) {
      Lanes sum[VECTORS];
      for (int v = 0; v < VECTORS; v++) sum[v] = load<Lanes>(to + k + v * LANES);
      for (int n = 0; n < count; n++)
        for (int v = 0; v < VECTORS; v++)
          sum[v] += weight[n] * load<Lanes>(cell[n] + k + v * LANES);
      for (int v = 0; v < VECTORS; v++) store(to + k + v * LANES, sum[v]);
    }
    for (; k < channels; k++)
      for (int n = 0; n < count; n++) to[k] += weight[n] * cell[n][k];
  }

 private:
  static constexpr int VECTORS = 4;  // of channels at a time
  int count = 0;
  const float *cell[16 * MAPS + 1];
  float weight[16 * MAPS + 1];
};

}  // namespace
