// Row pattern: long contiguous runs of one channel (NCHW). A block is one channel; its lanes all belong to it and are
// folded at the end of each chunk.
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
  static constexpr int64_t kChunk = 16384;  // elements reduced before the lanes are folded
  static constexpr int64_t kShortRun = 4;   // blocks

 public:
  // Chunks have `most_runs` runs at most.
  explicit Row(const Geometry& geometry, int64_t most_runs = kChunk) : g(geometry) {
    pieces = std::max<int64_t>(1, g.inner / kChunk);
    piece = (g.inner / pieces + L) / L * L;
    pieces = (g.inner + piece - 1) / piece;
    runs = std::clamp<int64_t>(kChunk / g.inner, 1, most_runs);
  }

  const Geometry& geometry() const { return g; }
  int64_t blocks() const { return g.stats; }
  int64_t chunks() const { return (g.outer + runs - 1) / runs * pieces; }
  int64_t first(int64_t block) const { return block; }
  int64_t width(int64_t) const { return 1; }

  double count(int64_t chunk) const {
    const Span s = span(0, chunk);
    return static_cast<double>(s.runs * s.length);
  }

  void moments(const T* x, int64_t block, int64_t chunk, double* mean, double* m2, Scratch&) const {
    const Span s = span(block, chunk);
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

  void grad_sums(const T* dy, const T* x, const A* mean, int64_t block, int64_t chunk, double* sum, double* dot,
                 Scratch&) const {
    const Span s = span(block, chunk);
    const int64_t whole = s.length / L, rest = s.length % L;
    Block<A> centre;
    std::fill_n(centre.v, kVecs, Vec<A>(mean[block]));
    LaneGradSums<A> body, tail;
    body.reset(centre);
    tail.reset(centre);
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

  // out = op(coefficients of the channel, in...) over one chunk.
  template <bool kStream, typename Op, typename... In>
  void map(int64_t block, int64_t chunk, const Op& op, const typename Op::Coefficients& coefficients, Scratch&, T* out,
           const In*... in) const {
    const Span s = span(block, chunk);
    Vec<A> c[Op::kCoefficients];
    for (int i = 0; i < Op::kCoefficients; ++i) c[i] = Vec<A>(coefficients[i][block]);
    const auto f = [&](int64_t, const auto&... v) { return op(c, v...); };
    int64_t at = s.offset;
    for (int64_t r = 0; r < s.runs; ++r, at += stride()) transform<kStream>(out + at, s.length, f, (in + at)...);
    if constexpr (kStream) stream_fence();
  }

 private:
  // A chunk: `runs` runs of `length` elements, stride() apart. Either many short runs or one piece of a long run.
  struct Span {
    int64_t offset, runs, length;
  };

  int64_t stride() const { return g.stats * g.inner; }

  // The whole blocks of all runs, as stretches of blocks `step` apart: along the runs, or down the chunk where runs are
  // too short to repay loading the accumulators for each.
  template <typename F>
  void for_each_stretch(const Span& s, int64_t whole, const F& f) const {
    if (whole > kShortRun)
      for (int64_t r = 0; r < s.runs; ++r) f(r * stride(), L, whole);
    else
      for (int64_t j = 0; j < whole; ++j) f(j * L, stride(), s.runs);
  }

  Span span(int64_t block, int64_t chunk) const {
    const int64_t run = chunk / pieces * runs, start = chunk % pieces * piece;
    return {run * stride() + block * g.inner + start, std::min(runs, g.outer - run), std::min(piece, g.inner - start)};
  }

  Geometry g;
  int64_t pieces, piece, runs;
};

}  // namespace batchnorm_ext::cpu
