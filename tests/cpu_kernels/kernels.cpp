// The passes of the CPU kernels, over tensors of every shape that takes another way through them, compared with sums in
// higher precision.
//
//   kernels "300x40x1 step"      the configurations that have this in their name: all by default
//
// Exit code 0, or 1 and what is off. Compiled for one type of elements, BATCHNORM_EXT_ELEMENT.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/maps.h"
#include "cpu/passes.h"
#include "problem.h"

namespace {

using namespace batchnorm_ext;
using namespace batchnorm_ext::cpu;
using Element = BATCHNORM_EXT_ELEMENT;
using Mapped =
    std::function<void(int64_t block, int64_t chunk, Scratch& scratch)>;  // shorter stack traces than a lambda

// [outer, channels, inner], and batch
constexpr Geometry kShapes[] = {
    // rows: long ones of several pieces, of one, and several to a chunk; short ones, whose whole blocks lie below each
    // other; those that are shorter than a block, and than a vector
    {1, 2, 40001},
    {3, 5, 1000},
    {2, 9, 1024},
    {40, 1, 600},
    {95, 4, 600},
    {5, 3, 257},
    {3, 7, 49},
    {20, 3, 45},
    {2, 3, 5},
    // columns: whole blocks, ragged ones, less than one
    {300, 64, 1},
    {40, 200, 1},
    {9, 3, 1},
    {1, 4, 1},
    // folded, with rows left over
    {37, 13, 1},
    {333, 40, 1},
    {5001, 3, 1},
    {9001, 1, 1},
    {403, 2, 3},
    // several chunks, the last one shorter; several blocks
    {5001, 64, 1},
    {290, 2048, 1},
    {261, 1999, 1},
    {33, 3001, 1},
    // short runs
    {100, 9, 49},
    {40, 64, 49},
    {35, 70, 36},
    {33, 512, 2},
    // the same of several samples: rows that are short and long, columns that are folded, of several chunks and blocks
    {1, 7, 49, 5},
    {1, 2, 1000, 3},
    {3, 5, 300, 2},
    {333, 13, 1, 3},
    {5001, 64, 1, 2},
    {261, 1999, 1, 2},
};

template <typename T>
struct Results {
  explicit Results(const Geometry& g)
      : mean(g.cells()), m2(g.cells()), dbias(g.cells()), dweight(g.cells()), y(g.numel(), 1), dx(g.numel(), 5) {}
  Buffer<double> mean, m2, dbias, dweight;
  Buffer<T> y, dx;
};

template <typename T>
class Test {
  using A = Acc<T>;
  // Of the type that the kernels accumulate in, and of fp64, in which they merge.
  static constexpr Exact kUnit = kRounding<A>, kMergeUnit = 0x1p-53L;

 public:
  Test(const Geometry& geometry, Data data, Checks checks)
      : g_(geometry), p_(geometry, data), checks_(std::move(checks)), table_(g_.cells()), grad_table_(g_.cells()) {
    // An element goes through so many additions in A at most: a tile and what its centre is made of, or all. Their
    // roundings, of std 1 / sqrt(3) units, add up like the steps of a random walk: here are 3.5 times its std.
    const auto additions = std::is_same_v<A, double> ? g_.count() + kTile : kTile + kFirstTile;
    walk_ = 2 * std::sqrt(static_cast<Exact>(additions));
    for (int64_t c = 0; c < g_.cells(); ++c) grad_table_.row(0)[c] = static_cast<A>(p_.mean[c]);
  }

  void run() {
    at::num_threads = 1;
    const Results<T> first = fused<false>();
    check_forward(first);
    check_backward(first);
    for (const int threads : {1, 3}) {
      at::num_threads = threads;
      check_same(fused<false>(), first);
      check_same(fused<true>(), first);
      check_same(halves(), first);
      check_scale();
    }
  }

 private:
  // Reductions that are followed by maps.
  template <bool kStream>
  Results<T> fused() {
    Results<T> results(g_);
    with_pattern<T>(g_, [&](const auto& pattern) {
      const Mapped normalize = [&](int64_t block, int64_t chunk, Scratch& scratch) {
        pattern.template map<kStream>(block, chunk, Normalize<A>(), table_.view(), scratch,
                                      std::array{results.y.data()}, p_.x.data());
      };
      reduce_forward(pattern, results, normalize);
      const Mapped grad = [&](int64_t block, int64_t chunk, Scratch& scratch) {
        pattern.template map<kStream>(block, chunk, NormalizeGrad<A>(), grad_table_.view(), scratch,
                                      std::array{results.dx.data()}, p_.dy.data(), p_.x.data());
      };
      reduce_backward(pattern, results, grad);
    });
    return results;
  }

  // Reductions and maps on their own.
  Results<T> halves() {
    Results<T> results(g_);
    with_pattern<T>(g_, [&](const auto& pattern) {
      reduce_forward(pattern, results, kNoMap);
      reduce_backward(pattern, results, kNoMap);
    });
    map_tensor(g_, Normalize<A>(), table_.view(), std::array{results.y.data()}, p_.x.data());
    map_tensor(g_, NormalizeGrad<A>(), grad_table_.view(), std::array{results.dx.data()}, p_.dy.data(), p_.x.data());
    return results;
  }

  void reduce_forward(const auto& pattern, const Results<T>& results, const Map& map) {
    const auto finish = [&](int64_t first, int64_t width, const double* mean, const double* m2) {
      std::copy_n(mean, width, &results.mean[first]);
      std::copy_n(m2, width, &results.m2[first]);
      std::vector<double> invstd(g_.cells());
      for (int64_t i = 0; i < width; ++i)
        invstd[first + i] = 1 / std::sqrt(m2[i] / static_cast<double>(g_.count()) + p_.eps);
      set_normalize(table_, first, width, results.mean.data(), invstd.data(), p_.weight.data(), p_.bias.data());
    };
    reduce_moments(pattern, p_.x.data(), finish, map);
  }

  void reduce_backward(const auto& pattern, const Results<T>& results, const Map& map) {
    const auto finish = [&](int64_t first, int64_t width, const double* dbias, const double* dweight) {
      std::copy_n(dbias, width, &results.dbias[first]);
      std::copy_n(dweight, width, &results.dweight[first]);
      set_normalize_grad(grad_table_, first, width, dbias, dweight, static_cast<double>(g_.count()), p_.mean.data(),
                         p_.invstd.data(), p_.weight.data());
    };
    reduce_grads(pattern, PlainGrad(), Centres<A>{grad_table_.row(0), p_.mean.data(), p_.invstd.data()}, finish, map,
                 p_.dy.data(), p_.x.data());
  }

  // What the evaluation's gradient does, with the scales that the gradient's table has.
  void check_scale() {
    const Buffer<T> dx(g_.numel(), 1);
    map_tensor(g_, Scale<A>(), grad_table_.view() + 3, std::array{dx.data()}, p_.dy.data());
    for (int64_t i = 0; i < g_.numel(); ++i)
      checks_.template rounded<T>("scaled", i, dx[i], Exact(grad_table_.row(3)[p_.cell_of(i)]) * Exact(p_.dy[i]),
                                  kUnit * std::fabs(Exact(dx[i])));
  }

  void check_same(const Results<T>& actual, const Results<T>& expected) {
    checks_.same("mean", actual.mean, expected.mean);
    checks_.same("m2", actual.m2, expected.m2);
    checks_.same("dbias", actual.dbias, expected.dbias);
    checks_.same("dweight", actual.dweight, expected.dweight);
    checks_.same("y", actual.y, expected.y);
    checks_.same("dx", actual.dx, expected.dx);
  }

  // In units of std: chunks are merged in fp64, where a mean is rounded to its own size.
  Exact mean_error(const Statistics& s) const { return walk_ * (kUnit + kMergeUnit * std::fabs(s.mean) / s.std); }
  // In units of its square. The first centre of a lane, a mean of kFirstTile elements, is up to 5 / sqrt(8) std away
  // from that of all: squares about it are up to 4 times as large.
  Exact var_error(const Statistics& s) const { return 4 * mean_error(s); }

  void check_forward(const Results<T>& results) {
    for (int64_t c = 0; c < g_.cells(); ++c) {
      const Statistics& s = p_.statistics[c];
      checks_.within("mean", c, results.mean[c], s.mean, mean_error(s) * s.std);
      checks_.within("var", c, results.m2[c] / Exact(g_.count()), s.var, var_error(s) * s.std * s.std);
    }
    for (int64_t i = 0; i < g_.numel(); ++i) {
      const int64_t c = p_.cell_of(i);
      const Statistics& s = p_.statistics[c];
      const Exact xhat = (Exact(p_.x[i]) - s.mean) / s.std, weight = p_.weight[c], bias = p_.bias[c];
      const Exact error = weight * (mean_error(s) + std::fabs(xhat) * var_error(s) / 2);
      const Exact terms = weight * std::fabs(xhat) + std::fabs(bias);
      checks_.template rounded<T>("y", i, results.y[i], weight * xhat + bias, error + 4 * kUnit * terms);
    }
  }

  void check_backward(const Results<T>& results) {
    const auto dy = [&](int64_t i) { return Exact(p_.dy[i]); };
    const std::vector<Exact> sum = p_.sums(dy), dot = p_.sums([&](int64_t i) { return dy(i) * p_.xhat(i); });
    // How large the terms are: what rounding is relative to.
    const std::vector<Exact> sum_terms = p_.sums([&](int64_t i) { return std::fabs(dy(i)); }),
                             dot_terms =
                                 p_.sums([&](int64_t i) { return std::fabs(dy(i)) * (1 + std::fabs(p_.xhat(i))); });
    const Exact rounding = walk_ * kUnit, n = g_.count();
    for (int64_t c = 0; c < g_.cells(); ++c) {
      checks_.within("dbias", c, results.dbias[c], sum[c], rounding * sum_terms[c]);
      checks_.within("dweight", c, results.dweight[c], dot[c], rounding * dot_terms[c]);
    }
    for (int64_t i = 0; i < g_.numel(); ++i) {
      const int64_t c = p_.cell_of(i);
      const Exact scale = Exact(p_.weight[c]) * p_.invstd[c], xhat = p_.xhat(i);
      const Exact terms = (sum_terms[c] + std::fabs(xhat) * dot_terms[c]) / n;
      checks_.template rounded<T>("dx", i, results.dx[i], scale * (dy(i) - (sum[c] + xhat * dot[c]) / n),
                                  scale * (4 * kUnit * std::fabs(dy(i)) + rounding * terms));
    }
  }

  Geometry g_;
  Problem<T> p_;
  Checks checks_;
  CoefficientTable<A, 3> table_;
  CoefficientTable<A, 5> grad_table_;
  Exact walk_;  // how far the roundings of a channel's sums go
};

}  // namespace

int main(int count, char** arguments) {
  const std::string filter = count > 1 ? arguments[1] : "";
  for (const Geometry& g : kShapes)
    for (int data = 0; data < static_cast<int>(std::size(kDataNames)); ++data) {
      if (std::is_same_v<Element, c10::Half> && Data(data) >= Data::kHuge) continue;
      const std::string name = std::to_string(g.outer) + "x" + std::to_string(g.channels) + "x" +
                               std::to_string(g.inner) + " " + kDataNames[data];
      if (name.find(filter) != std::string::npos) Test<Element>(g, Data(data), Checks(name)).run();
    }
  return 0;
}
