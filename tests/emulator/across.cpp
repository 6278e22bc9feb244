// One configuration of layer normalization over the channels of NCHW, forward and backward, each run twice, compared
// with sums in higher precision.
//
//   across dtype=bf16 batch=2 stats=12 inner=70 data=outlier seed=7 ...
//
// `stats` are the channels, `inner` the pixels. Exit code 0, or 1 and what is off.
#include "cuda/across.cuh"

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
  using A = Acc<T>;
  using Problem<T>::settings_, Problem<T>::g_, Problem<T>::aligned_, Problem<T>::eps_, Problem<T>::x_, Problem<T>::dy_;
  using Problem<T>::weight_, Problem<T>::bias_, Problem<T>::kUnit, Problem<T>::kMergeUnit, Problem<T>::lost;
  static constexpr int64_t kMostBlocks = 2;  // of a backward, so that a block has several strips

 public:
  explicit Test(const Settings& settings)
      : Problem<T>(settings), shape_{g_.batch, g_.channels, g_.inner}, stats_(2 * shape_.stats()) {}

  void run() {
    find_expected();
    const Buffer<T> y(g_.numel(), aligned_), dx(g_.numel(), aligned_);
    const Buffer<double> parts(2 * kMostBlocks * shape_.channels);
    std::vector<unsigned char> outputs[2];
    for (int turn = 0; turn < 2; ++turn) {
      y.clear(), dx.clear(), parts.clear(), stats_.clear();
      launch(AcrossForward<T>{x_.data(), y.data(), shape_, eps_, weight_.view(), bias_.view(), stats_.data()}, 0, turn);
      check_forward(y);
      const int64_t blocks = launch(AcrossBackward<T>{dy_.data(), x_.data(), dx.data(), shape_, weight_.view(),
                                                      stats_.data(), reinterpret_cast<double2*>(parts.data())},
                                    kMostBlocks, turn);
      check_backward(dx, parts, blocks);
      y.append_to(outputs[turn]), dx.append_to(outputs[turn]), parts.append_to(outputs[turn]);
    }
    for (std::size_t i = 0; i < outputs[0].size(); ++i)
      check("byte of an output repeated", static_cast<int64_t>(i), outputs[1][i], outputs[0][i], 0);
  }

 private:
  int64_t launch(const auto& op, int64_t most, int turn) const {
    using Op = std::remove_cvref_t<decltype(op)>;
    return with_across_kernel<Op>(aligned_, shape_, most, [&](auto kernel, int64_t blocks, int64_t shared_bytes) {
      emulator::launch({.grid = {static_cast<unsigned>(blocks)},
                        .block = kThreads,
                        .shared_bytes = static_cast<std::size_t>(shared_bytes),
                        .seed = static_cast<unsigned>(2 * settings_.number("seed") + turn)},
                       kernel, op);
    });
  }

  int64_t pixel_of(int64_t i) const { return i / g_.sample_numel() * g_.inner + i % g_.inner; }
  int64_t channel_of(int64_t i) const { return i / g_.inner % g_.channels; }
  Exact xhat(int64_t i) const { return (widen(x_[i]) - mean_[pixel_of(i)]) / std_[pixel_of(i)]; }
  Exact weighted(int64_t i) const { return weight_.get(channel_of(i)) * widen(dy_[i]); }

  // Sums over the channels of each pixel of f(element).
  template <typename F>
  std::vector<Exact> sums(const F& f) const {
    std::vector<Exact> result(shape_.stats());
    for (int64_t i = 0; i < g_.numel(); ++i) result[pixel_of(i)] += f(i);
    return result;
  }

  void find_expected() {
    const Exact n = shape_.channels;
    mean_ = sums([&](int64_t i) { return widen(x_[i]); });
    for (Exact& value : mean_) value /= n;
    std_ = sums([&](int64_t i) { return std::pow(widen(x_[i]) - mean_[pixel_of(i)], Exact(2)); });
    for (Exact& value : std_) value = std::sqrt(value / n + eps_);
    // Additions in A of a thread, then in fp64 of the warps, as the steps of a random walk; see kernels.cpp.
    walk_ = 2 * std::sqrt(std::ceil(n / kWarps) + kWarps);
  }

  // In units of std, as in Problem::of_batch: the first element of a thread is its first centre.
  Exact error(int64_t pixel) const {
    return walk_ * (kUnit + kMergeUnit * (1 + std::fabs(mean_[pixel]) / std_[pixel] + Exact(shape_.channels)));
  }

  void check_forward(const Buffer<T>& y) const {
    for (int64_t p = 0; p < shape_.stats(); ++p) {
      check_rounded<double>("mean", p, stats_[p], mean_[p], error(p) * std_[p]);
      check_rounded<double>("invstd", p, stats_[shape_.stats() + p], 1 / std_[p], error(p) / std_[p]);
    }
    for (int64_t i = 0; i < g_.numel(); ++i) {
      const int64_t p = pixel_of(i);
      const Exact weight = weight_.get(channel_of(i)), bias = bias_.get(channel_of(i)), scaled = weight * xhat(i);
      const Exact off = std::fabs(weight) * error(p) * (1 + std::fabs(xhat(i))) +
                        lost(widen(x_[i]), mean_[p], 1 / std_[p]) * std::fabs(weight);
      check_rounded<T>("y", i, widen(y[i]), scaled + bias, off + 4 * kUnit * (std::fabs(scaled) + std::fabs(bias)));
    }
  }

  void check_backward(const Buffer<T>& dx, const Buffer<double>& parts, int64_t blocks) const {
    const Exact n = shape_.channels;
    const auto sum = sums([&](int64_t i) { return weighted(i); });
    const auto dot = sums([&](int64_t i) { return weighted(i) * xhat(i); });
    const auto terms = sums([&](int64_t i) { return std::fabs(weighted(i)) * (1 + std::fabs(xhat(i))); });
    std::vector<Exact> dweight(shape_.channels), dbias(dweight), all(dweight);
    for (int64_t i = 0; i < g_.numel(); ++i) {
      const int64_t p = pixel_of(i), c = channel_of(i);
      const Exact dy = widen(dy_[i]), along = (sum[p] + xhat(i) * dot[p]) / n, off = error(p) + 4 * kUnit;
      const Exact bound = off * (std::fabs(weighted(i)) + terms[p] / n * (1 + std::fabs(xhat(i)))) / std_[p] +
                          lost(widen(x_[i]), mean_[p], dot[p] / n / std_[p]) / std_[p];
      check_rounded<T>("dx", i, widen(dx[i]), (weighted(i) - along) / std_[p], bound);
      dweight[c] += dy * xhat(i), dbias[c] += dy,
          all[c] += std::fabs(dy) * (1 + std::fabs(xhat(i))) * (off + 8 * kUnit);
    }
    for (int64_t c = 0; c < shape_.channels; ++c) {
      Exact found[2]{};
      for (int64_t i = 0; i < 2 * blocks; ++i) found[i % 2] += parts[(i / 2 * shape_.channels + c) * 2 + i % 2];
      check("dweight", c, found[0], dweight[c], all[c]);
      check("dbias", c, found[1], dbias[c], all[c]);
    }
  }

  const Image shape_;
  const Buffer<double> stats_;
  std::vector<Exact> mean_, std_;
  Exact walk_ = 0;
};

}  // namespace

int main(int count, char** arguments) {
  const Settings settings(count, arguments);
  with_dtype(settings, [&](auto type) { Test<decltype(type)>(settings).run(); });
  return failed;
}
