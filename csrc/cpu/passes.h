// The passes over memory that the ops are made of: which pattern takes them, and what is reduced.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../geometry.h"
#include "../math.h"
#include "column.h"
#include "memory.h"
#include "range.h"
#include "row.h"
#include "schedule.h"

namespace batchnorm_ext::cpu {

// Long runs of a channel are read one by one. Short ones are read across channels, several vectors at a time, as long
// as there are enough of them below each other to reduce.
inline bool has_long_runs(const Geometry& g) { return g.inner >= 256 || (g.outer < 32 && g.inner > 2 * g.outer); }

template <typename T, typename F>
void with_pattern(const Geometry& geometry, const F& f) {
  if (has_long_runs(geometry))
    f(Row<T>(geometry));
  else
    f(Column<T>(geometry));
}

template <typename T>
bool streams(const Geometry& geometry) {
  return geometry.numel() * static_cast<int64_t>(sizeof(T)) >= stream_bytes();
}

// For a map alone, which goes through memory in order: run by run, unless runs are short, or would share the cache
// lines that are streamed. Shorter runs lose by it, longer ones gain: evaluation of 32x512x7x7 and 32x1024x14x14 in
// bfloat16 at 0.6 and 1.7 times its speed (AMD EPYC, 2 cores, tcmalloc).
template <typename T, typename F>
void with_map_pattern(const Geometry& geometry, const F& f) {
  constexpr int64_t line = 64 / sizeof(T);
  if (geometry.inner >= 128 && (!streams<T>(geometry) || geometry.inner % line == 0))
    f(Row<T>(geometry, /*most_runs=*/1));
  else
    with_pattern<T>(geometry, f);
}

// f(std::true_type) where an output of this size is written past the caches.
template <typename T, typename F>
void with_streaming(const Geometry& geometry, const F& f) {
  if (streams<T>(geometry))
    f(std::true_type());
  else
    f(std::false_type());
}

// finish(first, width, mean, m2) takes the moments of each cell of x, then map(block, chunk) follows.
template <typename T, typename Pattern, typename Finish, typename Map>
void reduce_moments(const Pattern& pattern, const T* x, const Finish& finish, const Map& map) {
  const auto reduce = [&](int64_t block, int64_t chunk, double* mean, double* m2, Scratch& scratch) {
    pattern.moments(x, block, chunk, mean, m2, scratch);
  };
  const auto finish_moments = [&](int64_t first, int64_t width, double* mean, double* m2) {
    mend_moments(pattern.geometry(), x, first, width, mean, m2);
    finish(first, width, mean, m2);
  };
  const auto merge = [](double n, double n2, int64_t width, double* mean, double* m2, const double* mean2,
                        const double* m22) {
    for (int64_t c = 0; c < width; ++c) merge_moments(n, n2 / (n + n2), mean[c], m2[c], mean2[c], m22[c]);
  };
  reduce_then_map(pattern, Schedule(pattern), reduce, merge, finish_moments, map);
}

// finish(first, width, dbias, dweight) takes sum(dy) and sum(dy * xhat) of each cell, then map(block, chunk) follows.
// mean and invstd are those of each cell; `centre` is the mean, rounded to the type that the kernels compute in.
template <typename T, typename Pattern, typename Finish, typename Map>
void reduce_grads(const Pattern& pattern, const T* dy, const T* x, const Acc<T>* centre, const double* mean,
                  const double* invstd, const Finish& finish, const Map& map) {
  const auto reduce = [&](int64_t block, int64_t chunk, double* sum, double* dot, Scratch& scratch) {
    pattern.grad_sums(dy, x, centre, block, chunk, sum, dot, scratch);
  };
  const auto merge = [](double, double, int64_t width, double* sum, double* dot, const double* sum2,
                        const double* dot2) {
    for (int64_t c = 0; c < width; ++c) sum[c] += sum2[c], dot[c] += dot2[c];
  };
  const auto finish_sums = [&](int64_t first, int64_t width, double* sum, double* dot) {
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) {
      const int64_t c = first + i;
      dot[i] = make_grad_sums(sum[i], dot[i], mean[c], centre[c], invstd[c]).dweight;
    }
    mend_grads<T, Acc<T>>(pattern.geometry(), dy, x, first, width, mean, invstd, sum, dot);
    finish(first, width, sum, dot);
  };
  reduce_then_map(pattern, Schedule(pattern), reduce, merge, finish_sums, map);
}

// out = op(coefficients of each cell, in...) for a whole tensor.
template <typename T, typename Op, typename... In>
void map_tensor(const Geometry& geometry, const Op& op, const Acc<T>* const* coefficients, T* out, const In*... in) {
  if (geometry.numel() == 0) return;
  with_map_pattern<T>(geometry, [&](const auto& pattern) {
    with_streaming<T>(geometry, [&](auto streaming) {
      map_all(Schedule(pattern), [&](int64_t block, int64_t chunk, Scratch& scratch) {
        pattern.template map<streaming.value>(block, chunk, op, coefficients, scratch, out, in...);
      });
    });
  });
}

}  // namespace batchnorm_ext::cpu
