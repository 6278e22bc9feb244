// Column pattern: the elements of a cell are scattered in short runs (NHWC, (N, C), NCHW with a tiny image), so the
// lanes run along memory, across channels, and each lane reduces downwards. `fold` short memory rows are taken as one
// wide row where that makes the row a whole number of vectors.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <tuple>

#include "../geometry.h"
#include "moments.h"
#include "schedule.h"
#include "scratch.h"
#include "transform.h"

namespace batchnorm_ext::cpu {

template <typename T>
class Column {
  using A = Acc<T>;
  static constexpr int64_t L = kLanes<A>;
  static constexpr int64_t kColumns = 2048;       // of a block: its accumulators stay in the nearest caches
  static constexpr int64_t kFoldable = 512;       // rows at least this wide lose little to a ragged last vector
  static constexpr int64_t kMinRows = 128;        // of a chunk: what makes the folding of its lanes cheap
  static constexpr int64_t kChunk = 131072;       // elements
  static constexpr int64_t kMaxPartials = 65536;  // statistics of all chunks together: 1 MB

 public:
  explicit Column(const Geometry& geometry, bool may_fold = true) : g(geometry) {
    const int64_t narrow = g.channels * g.inner;
    while (may_fold && narrow * fold < kFoldable && narrow * fold % L != 0 && g.outer >= 2 * fold * kFirstTile)
      fold *= 2;
    // Too few rows to be cut into chunks leave the threads only blocks.
    const int64_t widest = g.outer > kMinRows ? kColumns : std::clamp(kGrainElements / g.outer, kFoldable, kColumns);
    const int64_t stats = g.channels / g.per_stat;  // of a sample
    const int64_t stat_columns = g.per_stat * g.inner;
    channels_per_block =
        fold > 1 ? g.channels : even_share(stats, std::max<int64_t>(1, widest / stat_columns)) * g.per_stat;
    blocks_per_sample = (g.channels + channels_per_block - 1) / channels_per_block;
    rows = g.outer / fold;
    const int64_t columns = channels_per_block * g.inner * fold;
    rows_per_chunk = even_share(rows, std::max({kMinRows, kChunk / columns, rows * g.cells() / kMaxPartials}));
    full_chunks = (rows + rows_per_chunk - 1) / rows_per_chunk;
  }

  const Geometry& geometry() const { return g; }
  int64_t blocks() const { return g.batch * blocks_per_sample; }
  int64_t chunks() const { return full_chunks + (g.outer % fold != 0); }
  int64_t first(int64_t block) const { return block / blocks_per_sample * g.channels + first_channel(block); }
  int64_t width(int64_t block) const { return std::min(channels_per_block, g.channels - first_channel(block)); }

  double count(int64_t chunk) const {
    const Span s = span(0, chunk);
    return static_cast<double>(s.rows * s.folded * g.inner);
  }

  void moments(const T* x, int64_t block, int64_t chunk, double* mean, double* m2, Scratch& scratch) const {
    const Span s = span(block, chunk);
    const int64_t n = padded(s);
    const auto [lanes, k, s1, s2, counts] =
        scratch.template arrays<LaneMoments<A, Order::kOfMemory>, double, double, double, double>({n / L, n, n, n, n});
    std::uninitialized_default_construct_n(lanes, n / L);
    const int64_t whole = s.columns / L, rest = s.columns % L;
    const T* row = x + s.offset;
    for (int64_t r = 0; r < s.rows; r += kFirstTile, row += kFirstTile * stride()) {
      const int64_t tile = std::min(kFirstTile, s.rows - r);
      for (int64_t j = 0; j < whole; ++j) {
        prefetch(row + kFirstTile * stride() + j * L);
        lanes[j].add(row + j * L, stride(), tile);
      }
      if (rest) lanes[whole].add(row + whole * L, stride(), tile, rest);
    }
    const MomentSets sets{k, s1, s2, counts};
    for (int64_t j = 0; j * L < s.columns; ++j) sets.take(j * L, lanes[j], std::min(L, s.columns - j * L));
    const int64_t across = width(block) * g.inner;
    for (int64_t f = 1; f < s.folded; ++f) sets.join(0, f * across, across);
    const int64_t channels = width(block);
    if (g.inner > 1)
      for (int64_t c = 0; c < channels; ++c) sets.fold(c * g.inner, g.inner);
    sets.results(g.inner, channels, mean, m2);
  }

  // `grad` takes the index of a row of the sample. `more`: what it takes beside dy and x.
  template <typename Grad = PlainGrad, typename... More>
  void grad_sums(const T* dy, const T* x, const A* mean, int64_t block, int64_t chunk, double* sum, double* dot,
                 Scratch& scratch, const Grad& grad = {}, const More*... more) const {
    constexpr int K = Grad::kCoefficients;
    const Span s = span(block, chunk);
    const int64_t n = padded(s);
    const auto [lanes, spread, sums, dots] =
        scratch.template arrays<LaneGradSums<A, Order::kOfMemory, K>, A, double, double>(
            {n / L, spreads(s) ? (1 + K) * n : 0, n, n});
    std::uninitialized_default_construct_n(lanes, n / L);
    const A* along[1 + K];
    for (int k = 0; k < 1 + K; ++k) along[k] = along_columns(per_cell(mean, grad, k), block, s, spread + k * n);
    const int64_t whole = s.columns / L, rest = s.columns % L;
    for (int64_t j = 0; j < whole; ++j) lanes[j].reset([&](int k) { return load_block<kVecs>(along[k] + j * L); });
    if (rest) lanes[whole].reset([&](int k) { return load_block<kVecs>(along[k] + whole * L, rest); });
    int64_t at = s.offset;
    for (int64_t r = 0; r < s.rows; r += kFirstTile, at += kFirstTile * stride()) {
      const int64_t tile = std::min(kFirstTile, s.rows - r);
      const auto add = [&](int64_t j, int64_t some) __attribute__((always_inline)) {
        const int64_t here = at + j * L;
        lanes[j].add(grad.from(first_row(chunk) + r), stride(), tile, some, dy + here, x + here, (more + here)...);
      };
      for (int64_t j = 0; j < whole; ++j) {
        const int64_t below = at + j * L + kFirstTile * stride();
        prefetch(dy + below);
        prefetch(x + below);
        (prefetch(more + below), ...);
        add(j, L);
      }
      if (rest) add(whole, rest);
    }
    for (int64_t first = 0; first < s.columns; first += L) lanes[first / L].finish(sums + first, dots + first);
    const int64_t across = width(block) * g.inner;
    for (int64_t f = 1; f < s.folded; ++f)
      for (int64_t column = 0; column < across; ++column) {
        sums[column] += sums[f * across + column];
        dots[column] += dots[f * across + column];
      }
    for (int64_t c = 0; c < width(block); ++c) {
      sum[c] = g.inner == 1 ? sums[c] : sum_of(sums + c * g.inner, g.inner);
      dot[c] = g.inner == 1 ? dots[c] : sum_of(dots + c * g.inner, g.inner);
    }
  }

  // out = op(coefficients of each cell, parameters, in...) over one chunk, where the rows of a sample have parameters
  // of their own. Not folded.
  template <bool kStream, size_t kOutputs, typename Op, typename... In>
  void map_along(int64_t block, int64_t chunk, const Op& op, const A* const* coefficients, const A* const* parameters,
                 int64_t, const std::array<T*, kOutputs>& out, const In*... in) const {
    const Span s = span(block, chunk);
    int64_t at = s.offset;
    for (int64_t r = 0; r < s.rows; ++r, at += stride()) {
      Coefficients<A, Op::kParameters> row;
      for (int i = 0; i < Op::kParameters; ++i) row[i] = Vec<A>(parameters[i][first_row(chunk) + r]);
      const auto f = [&](int64_t j, const auto&... v) {
        return op(CoefficientsAt<A>{coefficients, first(block) + j}, row, v...);
      };
      transform<kStream>(advanced(out, at), s.columns, f, LaneIndex(), (in + at)...);
    }
  }

  // f(offset, columns, row of the sample) for each row of a chunk. Not folded.
  template <typename F>
  void for_each_row(int64_t block, int64_t chunk, const F& f) const {
    const Span s = span(block, chunk);
    for (int64_t r = 0; r < s.rows; ++r) f(s.offset + r * stride(), s.columns, first_row(chunk) + r);
  }

  // out = op(coefficients of each cell, in...) over one chunk.
  template <bool kStream, size_t kOutputs, typename Op, typename... In>
  void map(int64_t block, int64_t chunk, const Op& op, const A* const* coefficients, Scratch& scratch,
           const std::array<T*, kOutputs>& out, const In*... in) const {
    const Span s = span(block, chunk);
    const int64_t pitch = spreads(s) ? s.columns + L : 0;  // whole vectors are read from any column on
    A* const spread = std::get<0>(scratch.template arrays<A>({Op::kCoefficients * pitch}));
    const A* c[Op::kCoefficients];
    for (int i = 0; i < Op::kCoefficients; ++i) c[i] = along_columns(coefficients[i], block, s, spread + i * pitch);
    const auto of_lanes = [&](int64_t j) { return CoefficientsAt<A>{c, j}; };
    int64_t at = s.offset;
    for (int64_t r = 0; r < s.rows; ++r, at += stride())
      transform<kStream>(advanced(out, at), s.columns, op, of_lanes, (in + at)...);
  }

 private:
  // A chunk of a block: `rows` rows of `columns` elements, stride() apart, each made of `folded` memory rows. What is
  // left when `fold` does not divide the memory rows is a chunk of its own, of one narrower row.
  struct Span {
    int64_t offset, rows, columns, folded;
  };

  int64_t stride() const { return fold * g.channels * g.inner; }

  int64_t first_row(int64_t chunk) const { return std::min(chunk * rows_per_chunk, rows); }

  int64_t first_channel(int64_t block) const { return block % blocks_per_sample * channels_per_block; }

  Span span(int64_t block, int64_t chunk) const {
    const int64_t row = first_row(chunk);
    const int64_t folded = chunk < full_chunks ? fold : g.outer % fold;
    return {g.first_of(first(block)) + row * stride(), chunk < full_chunks ? std::min(rows_per_chunk, rows - row) : 1,
            width(block) * g.inner * folded, folded};
  }

  // Asks for a full block of a tile, which may be past the end: to the processor, a few pixels of some channels and
  // then those of the next channels look like no pattern. Not for the nearest cache, where pixels a power of two apart
  // crowd each other out, and not for the few long rows of an NCHW batch, whose pages are far apart: they only lose by
  // it.
  void prefetch(const T* p) const {
    if (g.inner > 1) return;
    for (int64_t r = 0; r < kFirstTile; ++r, p += stride())
      for (int64_t i = 0; i < L; i += 64 / sizeof(T)) __builtin_prefetch(p + i, 0, 2);
  }

  // Columns of whole blocks.
  int64_t padded(const Span& s) const { return (s.columns + L - 1) / L * L; }

  bool spreads(const Span& s) const { return s.folded > 1 || g.inner > 1; }

  // One value per column of the block, from one per cell.
  const A* along_columns(const A* per_cell, int64_t block, const Span& s, A* spread) const {
    const A* source = per_cell + first(block);
    if (!spreads(s)) return source;
    A* to = spread;
    if (g.inner == 1)
      to = std::copy_n(source, width(block), to);
    else
      for (int64_t c = 0; c < width(block); ++c) to = std::fill_n(to, g.inner, source[c]);
    for (int64_t f = 1; f < s.folded; ++f) to = std::copy_n(spread, s.columns / s.folded, to);
    return spread;
  }

  Geometry g;
  int64_t fold = 1, channels_per_block, blocks_per_sample, rows, rows_per_chunk, full_chunks;
};

}  // namespace batchnorm_ext::cpu
