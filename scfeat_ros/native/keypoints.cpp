// From the score map to keypoints.
//
// selection.py says the same in OpenCV's operators.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "call.h"

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

struct Maximum {
  float score;
  int row, column;

  // Equal ones are in the order of the image.
  bool is_before(const Maximum &other) const {
    if (score != other.score) return score > other.score;
    return row != other.row ? row < other.row : column < other.column;
  }
};

// Local maxima above a threshold that are inside of the border and of the mask (or null), and in a
// neighbourhood with texture; in the order of the image. Rows of the (height, width, 3) image lie
// `pitch` bytes apart.
std::vector<Maximum> local_maxima(const float *scores, int height, int width, const uint8_t *image,
                                  long pitch, const uint8_t *mask, int radius, float threshold,
                                  int border, int threads) {
  std::vector<std::vector<Maximum>> found(threads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<Maximum> &mine = found[omp_get_thread_num()];
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
        // before the maximum, since without texture there are plateaus, where every neighbour is
        // looked at
        const uint8_t *centre = image + y * pitch + 3 * x;
        if (!any_neighbour(y, x, TEXTURE_RADIUS, height, width, [&](int v, int u) {
              return std::memcmp(image + v * pitch + 3 * u, centre, 3) != 0;
            }))
          continue;
        bool above_one = radius == 0;
        const bool exceeded = any_neighbour(y, x, radius, height, width, [&](int v, int u) {
          const float other = scores[long(v) * width + u];
          above_one |= other < value;
          return other > value;
        });
        if (above_one && !exceeded) mine.push_back({value, y, x});
      }
    }
  }
  std::vector<Maximum> all;
  for (const auto &part : found) all.insert(all.end(), part.begin(), part.end());
  return all;
}

// Where a maximum lies: at the score-weighted mean of its 3x3 neighbourhood.
void locate(const float *scores, int height, int width, const Maximum &maximum, float *point) {
  const int y = maximum.row, x = maximum.column;
  float weight[9], least = maximum.score;
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
  point[0] = x + right / total;
  point[1] = y + down / total;
}

// The best `most` of the local maxima, best first, and how many these are.
void select(const float *scores, int height, int width, const uint8_t *image, long pitch,
            const uint8_t *mask, int radius, float threshold, int border, long most, bool subpixel,
            float *points, float *values, int64_t *count, int threads) {
  std::vector<Maximum> found = local_maxima(scores, height, width, image, pitch, mask, radius,
                                            threshold, border, threads);
  const auto before = [](const Maximum &a, const Maximum &b) { return a.is_before(b); };
  if (long(found.size()) > most) {
    std::nth_element(found.begin(), found.begin() + most, found.end(), before);
    found.resize(most);
  }
  std::sort(found.begin(), found.end(), before);
  *count = int64_t(found.size());
  for (size_t i = 0; i < found.size(); i++) {
    values[i] = found[i].score;
    points[2 * i] = float(found[i].column);
    points[2 * i + 1] = float(found[i].row);
    if (subpixel) locate(scores, height, width, found[i], points + 2 * i);
  }
}

}  // namespace

EXPORT(select, select)
