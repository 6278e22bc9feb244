// The loop of every map: over a row, from blocks of the inputs to blocks of the outputs.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "vec.h"

namespace batchnorm_ext::cpu {

// Each pointer, so many elements on.
template <typename T, size_t kOutputs>
std::array<T*, kOutputs> advanced(std::array<T*, kOutputs> out, int64_t by) {
  for (T*& p : out) p += by;
  return out;
}

// For ops that take the index itself. Not std::identity, which would return a reference to a temporary.
struct LaneIndex {
  int64_t operator()(int64_t i) const { return i; }
};

// out[i] = op(at(i), in[i]...) for i in [0, n): `op` takes what `at` gives for the index of a vector's first lane, and
// one vector of each input. An op with kVectors may have several outputs: it takes blocks of at least so many vectors,
// but for the end of a row, and at(first lane of the q-th vector) as a function of q. It is passed by value, so that
// its constants can stay in registers: for all that the compiler knows, a store might change the caller's copy. With
// kStream all outputs must have the same offset from a vector's boundary. The first output may be one of the inputs.
template <bool kStream, typename T, size_t kOutputs, typename Op, typename At, typename... In>
inline void transform(const std::array<T*, kOutputs>& out, int64_t n, const Op op, const At& at, const In*... in) {
  using A = Acc<T>;
  constexpr int64_t width = Vec<T>::size(), L = kLanes<A>;
  const auto apply = [&]<int V>(int64_t i, const Block<A, V>& x, const auto&... more) __attribute__((always_inline)) {
    const auto here = [&](int q) -> decltype(auto) { return at(i + q * Vec<A>::size()); };
    if constexpr (requires { Op::kVectors; }) {
      return op(here, x, more...);
    } else {
      static_assert(kOutputs == 1);
      return std::array{
          make_block<A, V>([&](int q) __attribute__((always_inline)) { return op(here(q), x.v[q], more.v[q]...); })};
    }
  };
  const auto step = [&]<int V, bool kThisStream>(int64_t i) __attribute__((always_inline)) {
    const auto y = apply(i, load_block<V>(in + i)...);
    unrolled<kOutputs>([&](int k) __attribute__((always_inline)) { store_block<kThisStream>(out[k] + i, y[k]); });
  };
  const auto partial = [&](int64_t i, int64_t count) {
    const auto y = apply(i, load_block<kParts<T>>(in + i, count)...);
    unrolled<kOutputs>([&](int k) __attribute__((always_inline)) {
      narrow<T>(y[k], [&](const Vec<T>& part, int64_t) { part.store(out[k] + i, count); });
    });
  };
  int64_t i = 0;
  if constexpr (kStream) {
    i = std::min<int64_t>(n, (-reinterpret_cast<intptr_t>(out[0]) & (width * sizeof(T) - 1)) / sizeof(T));
    if (i > 0) partial(0, i);
  }
  // As few vectors at once as the op allows: all stay in registers.
  constexpr int kAtOnce = [] {
    if constexpr (requires { Op::kVectors; }) return std::max(kParts<T>, Op::kVectors);
    return kParts<T>;
  }();
  for (; i + L <= n; i += L) {
    if constexpr (requires { Op::kVectors; }) prefetch_ahead((in + i)...);
#pragma GCC unroll 4
    for (int q = 0; q < kVecs; q += kAtOnce) step.template operator()<kAtOnce, kStream>(i + q * Vec<A>::size());
  }
  for (; i + width <= n; i += width) step.template operator()<kParts<T>, kStream>(i);
  if (i == n) return;
  const bool in_place = ((static_cast<const void*>(in) == out[0]) || ...);
  if (kStream || n < width || in_place)  // in place, the neighbour's inputs are gone
    partial(i, n - i);
  else  // overlaps its neighbour: to write an element twice is cheaper than to mask, but not past the caches
    step.template operator()<kParts<T>, false>(n - width);
}

}  // namespace batchnorm_ext::cpu
