// Functions that Python calls, with the address of their arguments: eight bytes for each. They return
// whether there was memory for what they keep (but not for what their threads keep, which is little).
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>
#include <utility>

namespace {

union Word {
  void *address;
  int64_t whole;
  float real;
};

template <typename T>
T argument(Word word) {
  if constexpr (std::is_pointer_v<T>)
    return static_cast<T>(word.address);
  else if constexpr (std::is_floating_point_v<T>)
    return T(word.real);
  else
    return T(word.whole);
}

template <typename... Arguments, size_t... I>
void apply(void (*function)(Arguments...), const Word *words, std::index_sequence<I...>) {
  function(argument<Arguments>(words[I])...);
}

template <typename... Arguments>
int apply(void (*function)(Arguments...), const Word *words) {
  try {
    apply(function, words, std::index_sequence_for<Arguments...>{});
  } catch (const std::bad_alloc &) {
    return false;
  }
  return true;
}

}  // namespace

#define EXPORT(name, ...) \
  extern "C" int scfeat_##name(const Word *words) { return apply(__VA_ARGS__, words); }

// A template for maps of both types.
#define EXPORT_TYPES(name)            \
  EXPORT(name##_float, name<float>)   \
  EXPORT(name##_bfloat16, name<bfloat16>)
