// Vectors of as many floats as a register of this CPU holds.
#pragma once

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));

}  // namespace
