// A sequence of kernels in one call, without Python between them.

#include "call.h"

namespace {

struct Step {
  void (*kernel)(const Word *words);
  const Word *words;
};

}  // namespace

extern "C" void replay(const Step *steps, long count) {
  for (long i = 0; i < count; i++) steps[i].kernel(steps[i].words);
}
