// One configuration of the kernels that make statistics of cells: their outputs against sums in higher precision.
//
//   combine dtype=f64 batch=2 stats=12 per_stat=4 outer=3 inner=5 data=shifted ...
//
// Exit code 0, or 1 and what is off.
#include "cuda/combine.cuh"

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "checks.h"
#include "problem.h"
#include "settings.h"

namespace {

using namespace batchnorm_ext;
using namespace batchnorm_ext::cuda;

template <typename T>
class Test : Problem<T> {
  using Problem<T>::settings_, Problem<T>::g_, Problem<T>::eps_, Problem<T>::x_, Problem<T>::dy_, Problem<T>::weight_;
  using Problem<T>::cell_of, Problem<T>::sums, Problem<T>::kMergeUnit;

 public:
  explicit Test(const Settings& settings) : Problem<T>(settings) { g_.per_stat = settings.number("per_stat"); }

  void run() {
    combine_moments();
    combine_grads();
  }

 private:
  void launch(const auto& op) const {
    const auto blocks = static_cast<unsigned>((op.warps() + kWarps - 1) / kWarps);
    emulator::launch({.grid = {blocks}, .block = kThreads, .seed = static_cast<unsigned>(settings_.number("seed"))},
                     combine_kernel<std::remove_cvref_t<decltype(op)>>, op);
  }

  // The sums over cells of each statistic.
  std::vector<Exact> of_stats(const std::vector<Exact>& cells) const {
    std::vector<Exact> result(g_.stats());
    for (int64_t c = 0; c < g_.cells(); ++c) result[stat_of(g_, c)] += cells[c];
    return result;
  }

  void combine_moments() const {
    const Exact n = g_.cell_count();
    std::vector<Exact> means = sums([&](int64_t i) { return widen(x_[i]); });
    std::vector<Exact> total = of_stats(means);
    for (Exact& mean : means) mean /= n;
    for (Exact& mean : total) mean /= g_.count();
    const auto m2_about = [&](const auto& mean) {
      return sums([&](int64_t i) { return std::pow(widen(x_[i]) - mean(cell_of(i)), Exact(2)); });
    };
    const std::vector<Exact> m2 = m2_about([&](int64_t c) { return means[c]; });
    const std::vector<Exact> all = of_stats(m2_about([&](int64_t c) { return total[stat_of(g_, c)]; }));
    const Buffer<double> in(4 * g_.cells() + 1), stats(2 * g_.stats());
    for (int64_t c = 0; c < g_.cells(); ++c)
      write_sums(in.data(), g_.cells(), c, static_cast<double>(n), static_cast<double>(means[c]),
                 static_cast<double>(m2[c]));
    write_count(in.data(), g_.cells(), static_cast<double>(n));
    launch(CombineMoments<T>{x_.data(), g_, eps_, in.data(), stats.data()});
    for (int64_t s = 0; s < g_.stats(); ++s) {
      // A few roundings for each cell, in fp64: of the differences of means, and of the means themselves.
      const Exact std = std::sqrt(all[s] / g_.count() + eps_), walk = 4 * std::sqrt(Exact(g_.per_stat)) * kMergeUnit;
      check_rounded<double>("mean", s, stats[s], total[s],
                            walk * g_.per_stat * std + 4 * kMergeUnit * std::fabs(total[s]));
      check_rounded<double>("invstd", s, stats[g_.stats() + s], 1 / std, walk * (1 + std::fabs(total[s]) / std) / std);
    }
  }

  // The sums over samples of each channel.
  std::vector<Exact> of_channels(const std::vector<Exact>& cells) const {
    std::vector<Exact> result(g_.channels);
    for (int64_t c = 0; c < g_.cells(); ++c) result[c % g_.channels] += cells[c];
    return result;
  }

  void combine_grads() const {
    const std::vector<Exact> dbias = sums([&](int64_t i) { return widen(dy_[i]); });
    const std::vector<Exact> dweight = sums([&](int64_t i) { return Exact(widen(dy_[i])) * widen(x_[i]); });
    const Buffer<double> in(2 * g_.cells()), combined(2 * g_.stats());
    const Buffer<float> gradients[2] = {Buffer<float>(g_.channels), Buffer<float>(g_.channels)};
    std::vector<Exact> expected[2], terms[2], parameters[2], parameter_terms[2];
    for (int half = 0; half < 2; ++half) {
      std::vector<Exact> cells = half == 0 ? dbias : dweight, sizes(g_.cells());
      for (int64_t c = 0; c < g_.cells(); ++c) {
        in[half * g_.cells() + c] = static_cast<double>(cells[c]);
        cells[c] = in[half * g_.cells() + c];
      }
      const auto size_of_all = [&] {
        for (int64_t c = 0; c < g_.cells(); ++c) sizes[c] = std::fabs(cells[c]);
        return sizes;
      };
      parameters[half] = of_channels(cells), parameter_terms[half] = of_channels(size_of_all());
      for (int64_t c = 0; c < g_.cells(); ++c) cells[c] *= weight_.get(channel_of(g_, c));
      expected[half] = of_stats(cells), terms[half] = of_stats(size_of_all());
    }
    for (double* const out : {combined.data(), static_cast<double*>(nullptr)}) {
      for (const Buffer<float>& of : gradients) std::fill_n(of.data(), g_.channels, NAN);
      launch(CombineGrads<T>{g_, weight_.view(), {gradients[1].data()}, {gradients[0].data()}, in.data(), out});
      for (int64_t i = 0; i < 2 * g_.channels; ++i) {
        const int64_t half = i / g_.channels, c = i % g_.channels;
        check_rounded<float>(half == 0 ? "dbias" : "dweight", c, gradients[half][c], parameters[half][c],
                             g_.batch * kMergeUnit * parameter_terms[half][c]);
      }
    }
    for (int64_t i = 0; i < 2 * g_.stats(); ++i) {
      const int64_t half = i / g_.stats(), s = i % g_.stats();
      check("combined", i, combined[i], expected[half][s], g_.per_stat * kMergeUnit * terms[half][s]);
    }
  }
};

}  // namespace

int main(int count, char** arguments) {
  const Settings settings(count, arguments);
  with_dtype(settings, [&](auto type) { Test<decltype(type)>(settings).run(); });
  return failed;
}
