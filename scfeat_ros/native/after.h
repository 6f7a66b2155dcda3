// What follows a convolution.
#pragma once

#include "bfloat16.h"

namespace {

// A bias and a map to be added (null for none), and ReLU.
template <typename T>
struct After {
  const float *bias;
  const T *plus;
  bool relu;

  // Lanes of a result, from an output channel on; `place` is where they go in the map.
  Lanes operator()(Lanes value, int channel, long place) const {
    if (bias) value += load<Lanes>(bias + channel);
    if (plus) value += read_lanes(plus + place);
    return relu ? (value > 0.0f ? value : Lanes{}) : value;
  }
};

}  // namespace
