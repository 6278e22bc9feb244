// Row pattern: long contiguous runs of one cell (NCHW). The lanes all belong to one cell and are folded at the end of
// each chunk. A block is one statistic, or several that have few elements each: they are finished together.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../geometry.h"
#include "moments.h"
#include "scratch.h"

namespace batchnorm_ext::cpu {

template <typename T>
class Row {
  using A = Acc<T>;
  static constexpr int64_t L = kLanes<A>;
  static constexpr int64_t kPart = Vec<T>::size();  // elements of the smallest load
  static constexpr int64_t kChunk = 16384;          // elements reduced before the lanes are folded
  static constexpr int64_t kShortRun = 4;           // blocks of lanes
  static constexpr int64_t kBlock = 4096;           // elements of a block of several statistics, at most,
  static constexpr int64_t kMostStats = 64;         // and these statistics

 public:
  // Chunks have `most_runs` runs at most.
  explicit Row(const Geometry& geometry, int64_t most_runs = kChunk) : g(geometry) {
    pieces = std::max<int64_t>(1, g.inner / kChunk);
    piece = (g.inner / pieces + L) / L * L;
    pieces = (g.inner + piece - 1) / piece;
    runs = std::clamp<int64_t>(kChunk / g.inner, 1, most_runs);
    const int64_t stats =
        chunks() == 1 ? std::clamp<int64_t>(kBlock / std::max<int64_t>(1, g.count()), 1, kMostStats) : 1;
    cells_per_block = stats * g.per_stat;
  }

  const Geometry& geometry() const { return g; }
  int64_t blocks() const { return (g.cells() + cells_per_block - 1) / cells_per_block; }
  int64_t chunks() const { return (g.outer + runs - 1) / runs * pieces; }
  int64_t first(int64_t block) const { return block * cells_per_block; }
  int64_t width(int64_t block) const { return std::min(cells_per_block, g.cells() - first(block)); }

  double count(int64_t chunk) const {
    const Span s = span(0, chunk);
    return static_cast<double>(s.runs * s.length);
  }

  void moments(const T* x, int64_t block, int64_t chunk, double* mean, double* m2, Scratch&) const {
    for (int64_t i = 0, c = first(block); i < width(block); ++i, ++c) cell_moments(x, c, chunk, mean + i, m2 + i);
  }

  void grad_sums(const T* dy, const T* x, const A* mean, int64_t block, int64_t chunk, double* sum, double* dot,
                 Scratch&) const {
    for (int64_t i = 0, c = first(block); i < width(block); ++i, ++c)
      cell_grad_sums(dy, x, mean[c], c, chunk, sum + i, dot + i);
  }

  // out = op(coefficients of each cell, parameters, in...) over one chunk, where the elements of a run have parameters
  // of their own. They are those of `period` cells.
  template <bool kStream, typename Op, typename... In>
  void map_along(int64_t block, int64_t chunk, const Op& op, const A* const* coefficients, const A* const* parameters,
                 int64_t period, T* out, const In*... in) const {
    for (int64_t c = first(block); c < first(block) + width(block); ++c) {
      const Span s = span(c, chunk);
      Vec<A> cell[Op::kCoefficients];
      for (int i = 0; i < Op::kCoefficients; ++i) cell[i] = Vec<A>(coefficients[i][c]);
      const int64_t along = c % period * g.inner + s.offset - g.first_of(c);
      const auto f = [&](int64_t j, const auto&... v) {
        Vec<A> at[Op::kParameters];
        for (int i = 0; i < Op::kParameters; ++i) at[i] = Vec<A>::loadu(parameters[i] + along + j);
        return op(cell, at, v...);
      };
      transform<kStream>(out + s.offset, s.length, f, (in + s.offset)...);
    }
    if constexpr (kStream) stream_fence();
  }

  // out = op(coefficients of each cell, in...) over one chunk.
  template <bool kStream, typename Op, typename... In>
  void map(int64_t block, int64_t chunk, const Op& op, const A* const* coefficients, Scratch&, T* out,
           const In*... in) const {
    for (int64_t c = first(block); c < first(block) + width(block); ++c) {
      const Span s = span(c, chunk);
      Vec<A> cell[Op::kCoefficients];
      for (int i = 0; i < Op::kCoefficients; ++i) cell[i] = Vec<A>(coefficients[i][c]);
      const auto f = [&](int64_t, const auto&... v) { return op(cell, v...); };
      int64_t at = s.offset;
      for (int64_t r = 0; r < s.runs; ++r, at += stride()) transform<kStream>(out + at, s.length, f, (in + at)...);
    }
    if constexpr (kStream) stream_fence();
  }

 private:
  // A chunk: `runs` runs of `length` elements, stride() apart. Either many short runs or one piece of a long run.
  struct Span {
    int64_t offset, runs, length;
  };

  void cell_moments(const T* x, int64_t cell, int64_t chunk, double* mean, double* m2) const {
    const Span s = span(cell, chunk);
    if (g.outer == 1 && s.length <= kTile * kPart) return few_moments(x + s.offset, s.length, mean, m2);
    const int64_t whole = s.length / L, rest = s.length % L;
    LaneMoments<A> body, tail;
    const T* const first = x + s.offset;
    for_each_stretch(s, whole, [&](int64_t at, int64_t step, int64_t blocks) { body.add(first + at, step, blocks); });
    if (rest) tail.add(first + whole * L, stride(), s.runs, rest);
    double memory[4][2 * L];
    const MomentSets sets{memory[0], memory[1], memory[2], memory[3]};
    if (whole) sets.take(0, body, L);
    if (rest) sets.take(whole ? L : 0, tail, rest);
    sets.fold(0, (whole ? L : 0) + rest);
    sets.results(1, 1, mean, m2);
  }

  void cell_grad_sums(const T* dy, const T* x, A mean, int64_t cell, int64_t chunk, double* sum, double* dot) const {
    const Span s = span(cell, chunk);
    if ((s.length + kPart - 1) / kPart * s.runs <= kTile) return few_grad_sums(dy, x, mean, s, sum, dot);
    const int64_t whole = s.length / L, rest = s.length % L;
    Block<A> centre;
    std::fill_n(centre.v, kVecs, Vec<A>(mean));
    LaneGradSums<A> body, tail;
    if (whole) body.reset(centre);
    if (rest) tail.reset(centre);
    const T *const first_dy = dy + s.offset, *const first = x + s.offset;
    for_each_stretch(
        s, whole, [&](int64_t at, int64_t step, int64_t blocks) { body.add(first_dy + at, first + at, step, blocks); });
    if (rest) tail.add(first_dy + whole * L, first + whole * L, stride(), s.runs, rest);
    double sums[2 * L], dots[2 * L];
    const int64_t used = whole ? L : 0;
    if (whole) body.finish(sums, dots);
    if (rest) tail.finish(sums + used, dots + used);
    *sum = sum_of(sums, used + rest);
    *dot = sum_of(dots, used + rest);
  }

  // In registers, about the mean: with few elements, most of the time would go into the lanes of the accumulators, and
  // the second reading finds them in the nearest cache.
  void few_moments(const T* x, int64_t n, double* mean, double* m2) const {
    constexpr int V = kParts<T>;
    Vec<A> sums[V], squares[V];
    for (int q = 0; q < V; ++q) sums[q] = squares[q] = Vec<A>(0);
    for (int64_t i = 0; i < n; i += kPart) {
      const Block<A, V> v = load_block<V>(x + i, n - i);
      for (int q = 0; q < V; ++q) sums[q] = sums[q] + v.v[q];
    }
    const double count = static_cast<double>(n);
    const A middle = static_cast<A>(sum_of_vectors(sums) / count);
    const Vec<A> centre(middle);
    const auto add = [&](const Block<A, V>& v) __attribute__((always_inline)) {
      for (int q = 0; q < V; ++q) {
        const Vec<A> d = v.v[q] - centre;
        sums[q] = sums[q] + d;
        squares[q] = at::vec::fmadd(d, d, squares[q]);
      }
    };
    for (int q = 0; q < V; ++q) sums[q] = Vec<A>(0);
    int64_t i = 0;
    for (; i + kPart <= n; i += kPart) add(load_block<V>(x + i));
    if (i < n) {
      Block<A, V> v = load_block<V>(x + i, n - i);
      for (int q = 0; q < V; ++q)
        v.v[q] = Vec<A>::set(centre, v.v[q], std::clamp<int64_t>(n - i - q * Vec<A>::size(), 0, Vec<A>::size()));
      add(v);
    }
    const double sum = sum_of_vectors(sums), shift = sum / count;
    *mean = middle + shift;
    const double second = sum_of_vectors(squares);
    *m2 = second - sum * shift;
    if (second > 0) return;
    for (int q = 0; q < V; ++q) sums[q] = sums[q].abs();
    if (sum_of_vectors(sums) > 0) *m2 = -1;  // all squares have vanished: range.h sums again what is out of range
  }

  // In registers: with few elements, most of the time would go into the lanes of the accumulators.
  void few_grad_sums(const T* dy, const T* x, A mean, const Span& s, double* sum, double* dot) const {
    constexpr int V = kParts<T>;
    const Vec<A> centre(mean);
    Vec<A> sums[V], dots[V];
    for (int q = 0; q < V; ++q) sums[q] = dots[q] = Vec<A>(0);
    int64_t at = s.offset;
    for (int64_t r = 0; r < s.runs; ++r, at += stride())
      for (int64_t i = 0; i < s.length; i += kPart) {
        const Block<A, V> g = load_block<V>(dy + at + i, s.length - i), v = load_block<V>(x + at + i, s.length - i);
        for (int q = 0; q < V; ++q) {
          sums[q] = sums[q] + g.v[q];
          dots[q] = at::vec::fmadd(g.v[q], v.v[q] - centre, dots[q]);
        }
      }
    *sum = sum_of_vectors(sums);
    *dot = sum_of_vectors(dots);
  }

  int64_t stride() const { return g.channels * g.inner; }

  // The whole blocks of all runs, as stretches of blocks `step` apart: along the runs, or down the chunk where runs are
  // too short to repay loading the accumulators for each.
  template <typename F>
  void for_each_stretch(const Span& s, int64_t whole, const F& f) const {
    if (whole > kShortRun)
      for (int64_t r = 0; r < s.runs; ++r) f(r * stride(), L, whole);
    else
      for (int64_t j = 0; j < whole; ++j) f(j * L, stride(), s.runs);
  }

  Span span(int64_t cell, int64_t chunk) const {
    const int64_t run = chunk / pieces * runs, start = chunk % pieces * piece;
    return {g.first_of(cell) + run * stride() + start, std::min(runs, g.outer - run), std::min(piece, g.inner - start)};
  }

  Geometry g;
  int64_t pieces, piece, runs, cells_per_block;
};

}  // namespace batchnorm_ext::cpu
