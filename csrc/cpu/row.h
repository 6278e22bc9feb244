// Row pattern: long contiguous runs of one cell (NCHW). The lanes all belong to one cell and are folded at the end of
// each chunk. A block is one statistic, or several that have few elements each: they are finished together.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "../geometry.h"
#include "moments.h"
#include "scratch.h"
#include "transform.h"

namespace batchnorm_ext::cpu {

template <typename T>
class Row {
  using A = Acc<T>;
  static constexpr int64_t L = kLanes<A>;
  static constexpr int64_t kPart = Vec<T>::size();  // elements of the smallest load
  static constexpr int64_t kChunk = 16384;          // elements reduced before the lanes are folded
  static constexpr int64_t kShortRun = 4;           // blocks of lanes
  static constexpr int64_t kBlock = 1024;           // elements of a block of several statistics, at most,
  static constexpr int64_t kMostStats = 16;         // and these statistics
  static constexpr Order kOrder = Order::kAny;      // of what is summed
  static constexpr int kMomentsTogether = 4;        // cells with few elements whose moments are taken at once

 public:
  explicit Row(const Geometry& geometry) : g(geometry) {
    pieces = std::max<int64_t>(1, g.inner / kChunk);
    piece = (g.inner / pieces + L) / L * L;
    pieces = (g.inner + piece - 1) / piece;
    runs = std::max<int64_t>(1, kChunk / g.inner);
    const int64_t stats =
        chunks() == 1 ? std::clamp<int64_t>(kBlock / std::max<int64_t>(1, g.count()), 1, kMostStats) : 1;
    cells_per_block = stats * g.per_stat;
  }

  const Geometry& geometry() const { return g; }
  int64_t blocks() const { return (g.cells() + cells_per_block - 1) / cells_per_block; }
  int64_t chunks() const { return (g.outer + runs - 1) / runs * pieces; }
  int64_t first(int64_t block) const { return block * cells_per_block; }
  int64_t width(int64_t block) const { return std::min(cells_per_block, g.cells() - first(block)); }

  // The elements of a chunk, which follow each other where there is one run of each cell.
  std::pair<int64_t, int64_t> extent(int64_t block, int64_t chunk) const {
    const Span s = span(chunk);
    const int64_t begin = start(first(block), s);
    return {begin, begin + (width(block) - 1) * g.inner + s.length};
  }

  double count(int64_t chunk) const {
    const Span s = span(chunk);
    return static_cast<double>(s.runs * s.length);
  }

  void moments(const T* x, int64_t block, int64_t chunk, double* mean, double* m2, Scratch&) const {
    const Span s = span(chunk);
    const int64_t cells = width(block), begin = first(block);
    const bool few = g.outer == 1 && s.length <= kTile * kPart;
    const auto take = [&]<int R>(int64_t i) {
      const T* rows[R];
      for (int r = 0; r < R; ++r) rows[r] = x + start(begin + i + r, s);
      few_moments(rows, s.length, mean + i, m2 + i);
    };
    if (few)
      for_each_together<kMomentsTogether>(cells, take);
    else
      for (int64_t i = 0; i < cells; ++i) cell_moments(x + start(begin + i, s), s, mean + i, m2 + i);
  }

  // See Column.
  template <typename Grad = PlainGrad, typename... More>
  void grad_sums(const T* dy, const T* x, const A* mean, int64_t block, int64_t chunk, double* sum, double* dot,
                 Scratch&, const Grad& grad = {}, const More*... more) const {
    const Span s = span(chunk);
    const int64_t cells = width(block), begin = first(block);
    const bool few = (s.length + kPart - 1) / kPart * s.runs <= kTile;
    for (int64_t i = 0; i < cells; ++i) {
      const int64_t at = start(begin + i, s);
      if (few)
        few_grad_sums(grad, mean, begin + i, s, sum + i, dot + i, dy + at, x + at, (more + at)...);
      else
        cell_grad_sums(grad, mean, begin + i, s, sum + i, dot + i, dy + at, x + at, (more + at)...);
    }
  }

  // out = op(coefficients of each cell, parameters, in...) over one chunk, where the elements of a run have parameters
  // of their own. They are those of `period` cells.
  template <bool kStream, size_t kOutputs, typename Op, typename... In>
  void map_along(int64_t block, int64_t chunk, const Op& op, const A* const* coefficients, const A* const* parameters,
                 int64_t period, const std::array<T*, kOutputs>& out, const In*... in) const {
    const Span s = span(chunk);
    for (int64_t c = first(block), last = c + width(block); c < last; ++c) {
      const int64_t at = start(c, s), along = c % period * g.inner + s.offset;
      Coefficients<A, Op::kCoefficients> cell;
      for (int i = 0; i < Op::kCoefficients; ++i) cell[i] = Vec<A>(coefficients[i][c]);
      const auto f = [&](int64_t j, const auto&... v) {
        return op(cell, CoefficientsAt<A>{parameters, along + j}, v...);
      };
      transform<kStream>(advanced(out, at), s.length, f, LaneIndex(), (in + at)...);
    }
  }

  // out = op(coefficients of each cell, in...) over one chunk.
  template <bool kStream, size_t kOutputs, typename Op, typename... In>
  void map(int64_t block, int64_t chunk, const Op& op, const A* const* coefficients, Scratch&,
           const std::array<T*, kOutputs>& out, const In*... in) const {
    const Span s = span(chunk);
    for (int64_t c = first(block), last = c + width(block); c < last; ++c) {
      Coefficients<A, Op::kCoefficients> cell;
      for (int i = 0; i < Op::kCoefficients; ++i) cell[i] = Vec<A>(coefficients[i][c]);
      const auto everywhere = [&](int64_t) -> const auto& { return cell; };
      int64_t at = start(c, s);
      for (int64_t r = 0; r < s.runs; ++r, at += stride())
        transform<kStream>(advanced(out, at), s.length, op, everywhere, (in + at)...);
    }
  }

 private:
  // A chunk of any cell: `runs` runs of `length` elements, stride() apart, from `offset` on. Either many short runs or
  // one piece of a long run.
  struct Span {
    int64_t offset, runs, length;
  };

  void cell_moments(const T* x, const Span& s, double* mean, double* m2) const {
    const int64_t whole = s.length / L, rest = s.length % L;
    LaneMoments<A, kOrder> body, tail;
    for_each_stretch(s, whole, [&](int64_t at, int64_t step, int64_t blocks) { body.add(x + at, step, blocks); });
    if (rest) tail.add(x + whole * L, stride(), s.runs, rest);
    double memory[4][2 * L];
    const MomentSets sets{memory[0], memory[1], memory[2], memory[3]};
    if (whole) sets.take(0, body, L);
    if (rest) sets.take(whole ? L : 0, tail, rest);
    sets.fold(0, (whole ? L : 0) + rest);
    sets.results(1, 1, mean, m2);
  }

  template <typename Grad, typename... In>
  void cell_grad_sums(const Grad& grad, const A* mean, int64_t cell, const Span& s, double* sum, double* dot,
                      const In*... in) const {
    const int64_t whole = s.length / L, rest = s.length % L;
    const auto load = [&](int k) {
      Block<A> everywhere;
      std::fill_n(everywhere.v, kVecs, Vec<A>(per_cell(mean, grad, k)[cell]));
      return everywhere;
    };
    LaneGradSums<A, kOrder, Grad::kCoefficients> body, tail;
    if (whole) body.reset(load);
    if (rest) tail.reset(load);
    for_each_stretch(s, whole,
                     [&](int64_t at, int64_t step, int64_t blocks) { body.add(grad, step, blocks, L, (in + at)...); });
    if (rest) tail.add(grad, stride(), s.runs, rest, (in + whole * L)...);
    double sums[2 * L], dots[2 * L];
    const int64_t used = whole ? L : 0;
    if (whole) body.finish(sums, dots);
    if (rest) tail.finish(sums + used, dots + used);
    *sum = sum_of(sums, used + rest);
    *dot = sum_of(dots, used + rest);
  }

  // The moments of R rows of n elements, in registers, about their means: with few elements, most of the time would go
  // into the lanes of the accumulators, and the second reading finds them in the nearest cache.
  template <int R>
  static void few_moments(const T* const (&rows)[R], int64_t n, double* mean, double* m2) {
    constexpr int V = kParts<T>;
    const double count = static_cast<double>(n);
    A middle[R];  // GCC 12 leaves out the rounding of a value that is first stored as a double
    Vec<A> sums[R][V], squares[R][V], centre[R];
    for (int r = 0; r < R; ++r)
      for (int q = 0; q < V; ++q) sums[r][q] = squares[r][q] = Vec<A>(0);
    for_each_load(n, [&](int64_t i, const auto& part) __attribute__((always_inline)) {
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(rows[r] + R * n + i, 0, 2);
        const Block<A, V> v = part.load(rows[r] + i);
        for (int q = 0; q < V; ++q) sums[r][q] = sums[r][q] + v.v[q];
      }
    });
    for (int r = 0; r < R; ++r) {
      middle[r] = static_cast<A>(sum_of_vectors(sums[r]) / count);
      centre[r] = Vec<A>(middle[r]);
      for (int q = 0; q < V; ++q) sums[r][q] = Vec<A>(0);
    }
    const auto add = [&](int r, const Block<A, V>& v) __attribute__((always_inline)) {
      for (int q = 0; q < V; ++q) {
        const Vec<A> d = v.v[q] - centre[r];
        sums[r][q] = sums[r][q] + d;
        squares[r][q] = at::vec::fmadd(d, d, squares[r][q]);
      }
    };
    int64_t i = 0;
    for (; i + kPart <= n; i += kPart)
      for (int r = 0; r < R; ++r) add(r, load_block<V, kOrder>(rows[r] + i));
    for (int r = 0; i < n && r < R; ++r) {
      Block<A, V> v = load_block<V>(rows[r] + i, n - i);
      for (int q = 0; q < V; ++q)
        v.v[q] = Vec<A>::set(centre[r], v.v[q], std::clamp<int64_t>(n - i - q * Vec<A>::size(), 0, Vec<A>::size()));
      add(r, v);
    }
    for (int r = 0; r < R; ++r) {
      const double sum = sum_of_vectors(sums[r]), shift = sum / count, second = sum_of_vectors(squares[r]);
      mean[r] = middle[r] + shift;
      m2[r] = second - sum * shift;
      if (second > 0) continue;
      for (int q = 0; q < V; ++q) sums[r][q] = sums[r][q].abs();
      if (sum_of_vectors(sums[r]) > 0) m2[r] = -1;  // all squares have vanished: range.h sums what is out of range
    }
  }

  // The gradient sums of a cell with few elements, in registers as well. One cell after the other, in the order of
  // memory: two at once were slower.
  template <typename Grad, typename... More>
  void few_grad_sums(const Grad& grad, const A* mean, int64_t cell, const Span& s, double* sum, double* dot,
                     const T* dy, const T* x, const More*... more) const {
    constexpr int V = kParts<T>, K = Grad::kCoefficients;
    Vec<A> sums[V], dots[V];
    const Vec<A> centre(mean[cell]);
    Coefficients<A, K> c;
    for (int k = 0; k < K; ++k) c[k] = Vec<A>(per_cell(mean, grad, 1 + k)[cell]);
    for (int q = 0; q < V; ++q) sums[q] = dots[q] = Vec<A>(0);
    const auto of = [&](int) -> const auto& { return c; };
    for (int64_t run = 0; run < s.runs; ++run)
      for_each_load(s.length, [&](int64_t i, const auto& part) __attribute__((always_inline)) {
        const int64_t here = run * stride() + i;
        const Block<A, V> value = part.load(x + here);
        const Block<A, V> entering = grad(of, 0, part.load(dy + here), value, part.load(more + here)...);
        grad.keep(part, dy + here, entering);
        for (int q = 0; q < V; ++q) {
          sums[q] = sums[q] + entering.v[q];
          dots[q] = at::vec::fmadd(entering.v[q], value.v[q] - centre, dots[q]);
        }
      });
    *sum = sum_of_vectors(sums);
    *dot = sum_of_vectors(dots);
  }

  // f(i, part) for the smallest loads that cover n elements: part.load(p + i) gives those from i on.
  template <typename F>
  static void for_each_load(int64_t n, const F& f) {
    constexpr int V = kParts<T>;
    int64_t i = 0;
    for (; i + kPart <= n; i += kPart) f(i, WholeBlock<V, kOrder>());
    if (i < n) f(i, PartialBlock<V>{0, n - i});
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

  Span span(int64_t chunk) const {
    const int64_t run = chunk / pieces * runs, begin = chunk % pieces * piece;
    return {run * stride() + begin, std::min(runs, g.outer - run), std::min(piece, g.inner - begin)};
  }

  // The first element of a chunk of the cell.
  int64_t start(int64_t cell, const Span& s) const { return g.first_of(cell) + s.offset; }

  Geometry g;
  int64_t pieces, piece, runs, cells_per_block;
};

}  // namespace batchnorm_ext::cpu
