// The passes over memory that the ops are made of: which pattern takes them, and what is reduced.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

#include "../geometry.h"
#include "../math.h"
#include "column.h"
#include "memory.h"
#include "range.h"
#include "row.h"
#include "schedule.h"
#include "transform.h"

namespace batchnorm_ext::cpu {

// Long runs of a channel are read one by one. Short ones are read across channels, several vectors at a time, as long
// as there are enough of them below each other to reduce.
inline bool has_long_runs(const Geometry& g) { return g.inner >= 256 || (g.outer < 32 && g.inner > 2 * g.outer); }

constexpr int64_t kMappedRun = 32;  // elements: shorter runs are mapped across channels

template <typename T>
int64_t bytes_of(const Geometry& geometry) {
  return geometry.numel() * static_cast<int64_t>(sizeof(T));
}

template <typename T, typename F>
void with_pattern(const Geometry& geometry, const F& f) {
  if (has_long_runs(geometry))
    f(Row<T>(geometry));
  else
    f(Column<T>(geometry));
}

// Whether all outputs have the same offset from a vector's boundary, as streaming them needs (see transform).
template <typename T, size_t kOutputs>
bool share_alignment(const std::array<T*, kOutputs>& out) {
  const auto place = [](const T* p) { return reinterpret_cast<uintptr_t>(p) % (Vec<T>::size() * sizeof(T)); };
  return std::all_of(out.begin(), out.end(), [&](const T* p) { return place(p) == place(out[0]); });
}

// Whether outputs from `least` bytes on, written in runs of so many elements, are streamed: runs that share their cache
// lines only if they are long.
template <typename T>
bool streams(const Geometry& geometry, int64_t run, int64_t least = stream_bytes()) {
  constexpr int64_t line = 64, long_run = 1024;  // bytes
  const int64_t bytes = run * static_cast<int64_t>(sizeof(T));
  return bytes_of<T>(geometry) >= least && (bytes % line == 0 || bytes >= long_run);
}

// The same for what a pattern writes.
template <typename T>
bool pattern_streams(const Geometry& geometry) {
  return streams<T>(geometry, has_long_runs(geometry) ? geometry.inner : geometry.channels * geometry.inner);
}

// f(std::true_type()) if outputs are large, to write them past the caches; otherwise f(std::false_type()).
template <typename F>
void stream_if(bool large, const F& f) {
  if (large)
    f(std::true_type());
  else
    f(std::false_type());
}

// The same for an output of the size of its input, which is read twice.
template <typename T, typename F>
void with_streaming(const Geometry& geometry, const F& f) {
  stream_if(pattern_streams<T>(geometry), f);
}

// finish(first, width, mean, m2) takes the moments of each cell of x, then map(block, chunk) follows.
template <typename T, typename Pattern>
void reduce_moments(const Pattern& pattern, const T* x, Finish finish, Map map) {
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

// The cells of a backward: mean and invstd of each, and the mean rounded to the type that the kernels compute in.
template <typename A>
struct Centres {
  const A* rounded;
  const double *mean, *invstd;
};

// finish(first, width, dbias, dweight) takes sum(g) and sum(g * xhat) of each cell, then map(block, chunk) follows.
// g is what `grad` makes of dy, x and `more` (lanes.h).
template <typename T, typename Pattern, typename Grad, typename... More>
void reduce_grads(const Pattern& pattern, const Grad& grad, const Centres<Acc<T>>& centres, Finish finish, Map map,
                  const T* dy, const T* x, const More*... more) {
  const auto& [rounded, mean, invstd] = centres;
  const auto reduce = [&](int64_t block, int64_t chunk, double* sum, double* dot, Scratch& scratch) {
    pattern.grad_sums(dy, x, rounded, block, chunk, sum, dot, scratch, grad, more...);
  };
  const auto merge = [](double, double, int64_t width, double* sum, double* dot, const double* sum2,
                        const double* dot2) {
    for (int64_t c = 0; c < width; ++c) sum[c] += sum2[c], dot[c] += dot2[c];
  };
  const auto finish_sums = [&](int64_t first, int64_t width, double* sum, double* dot) {
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) {
      const int64_t c = first + i;
      dot[i] = make_grad_sums(sum[i], dot[i], mean[c], rounded[c], invstd[c]).dweight;
    }
    mend_grads<T, Acc<T>>(pattern.geometry(), grad, first, width, mean, invstd, sum, dot, dy, x, more...);
    finish(first, width, sum, dot);
  };
  reduce_then_map(pattern, Schedule(pattern), reduce, merge, finish_sums, map);
}

// out[i] = op(coefficients of each cell, in[i]...) for i in [begin, end), run by run. No division for each run, which
// would slow down short ones.
template <bool kStream, typename T, size_t kOutputs, typename Op, typename... In>
void map_range(const Geometry& g, const Op& op, const Acc<T>* const* coefficients, int64_t begin, int64_t end,
               const std::array<T*, kOutputs>& out, const In*... in) {
  int64_t row = begin / (g.channels * g.inner), channel = begin / g.inner % g.channels;
  for (int64_t at = begin, stop = begin / g.inner * g.inner; at < end; at = stop, channel = 0, ++row) {
    const int64_t first = row / g.outer * g.channels;  // cell of the sample
    for (; at < end && channel < g.channels; at = stop, ++channel) {
      stop += g.inner;
      const int64_t n = std::min(end, stop) - at;
      Coefficients<Acc<T>, Op::kCoefficients> cell;
      for (int i = 0; i < Op::kCoefficients; ++i) cell[i] = Vec<Acc<T>>(coefficients[i][first + channel]);
      const auto everywhere = [&](int64_t) -> const auto& { return cell; };
      transform<kStream>(advanced(out, at), n, op, everywhere, (in + at)...);
    }
  }
}

// A map alone, where runs are long enough for it. It reads once, so that twice as much stays in the caches.
template <typename T, size_t kOutputs, typename Op, typename... In>
void map_by_runs(const Geometry& geometry, const Op& op, const Acc<T>* const* coefficients,
                 const std::array<T*, kOutputs>& out, const In*... in) {
  stream_if(streams<T>(geometry, geometry.inner, 2 * stream_bytes()) && share_alignment(out), [&](auto streaming) {
    parallel(geometry.numel(), kGrainElements, [&](int64_t begin, int64_t end) {
      map_range<streaming.value>(geometry, op, coefficients, begin, end, out, in...);
    });
  });
}

// out = op(coefficients of each cell, in...) for a whole tensor.
template <typename T, size_t kOutputs, typename Op, typename... In>
void map_tensor(const Geometry& geometry, const Op& op, const Acc<T>* const* coefficients,
                const std::array<T*, kOutputs>& out, const In*... in) {
  if (geometry.numel() == 0) return;
  if (geometry.inner >= kMappedRun || has_long_runs(geometry))
    return map_by_runs(geometry, op, coefficients, out, in...);
  const Column<T> pattern(geometry);
  stream_if(pattern_streams<T>(geometry) && share_alignment(out), [&](auto streaming) {
    map_all(Schedule(pattern), [&](int64_t block, int64_t chunk, Scratch& scratch) {
      pattern.template map<streaming.value>(block, chunk, op, coefficients, scratch, out, in...);
    });
  });
}

}  // namespace batchnorm_ext::cpu
