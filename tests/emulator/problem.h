// The tensors of one configuration, drawn at random, and what is known of their channels: statistics in higher
// precision, and how far those of the kernels may be off.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cuda/shape.h"
#include "settings.h"

namespace batchnorm_ext::cuda {

// Of a channel, and how far those of the kernel may be off.
struct Statistics {
  Exact mean, var, std;         // std = sqrt(var + eps)
  Exact mean_error, var_error;  // in units of std, and of its square
  Exact least;                  // eps, in units of the square of std

  // In units of 1 / std. A variance of which little is known may as well be 0.
  Exact invstd_error() const { return 1 / std::sqrt(std::max(1 - var_error, least)) - 1 + 0x1p-51L; }
};

// f(T()) with the type that the settings name.
template <typename F>
void with_dtype(const Settings& settings, const F& f) {
#if defined(BATCHNORM_EXT_KERNELS_OF)  // one type, for mutants: there are many to compile
  f(BATCHNORM_EXT_KERNELS_OF());
#else
  const std::string& dtype = settings.text("dtype");
  if (dtype == "f32")
    f(float());
  else if (dtype == "f64")
    f(double());
  else if (dtype == "f16")
    f(__half());
  else if (dtype == "bf16")
    f(__nv_bfloat16());
  else
    Settings::misuse(dtype);
#endif
}

template <typename T>
class Problem {
 public:
  explicit Problem(const Settings& settings)
      : settings_(settings),
        g_{settings.number("outer"), settings.number("stats"), settings.number("inner"), settings.number("batch")},
        n_(g_.count()),
        aligned_(settings.number("aligned") != 0),
        eps_(settings.is("data", "tiny") ? 1e-5 * kTiny * kTiny : 1e-5),
        random_(static_cast<unsigned>(settings.number("data_seed"))),
        x_(values(settings.text("data"))),
        dy_(values(settings.text("gradient"))),
        weight_(parameters(0.5, 1.5)),
        bias_(parameters(-1, 1)),
        running_mean_(parameters(-1, 1)),
        running_var_(parameters(0.5, 2)),
        residual_(values("normal")) {}

 protected:
  using A = Acc<T>;
  // Rounding to nearest: of the type that the kernels accumulate in, of fp64, in which they merge, and of this test.
  static constexpr Exact kUnit = kRounding<A>, kMergeUnit = 0x1p-53L, kExactUnit = 0x1p-64L;
  // How far the data go. float16 ends at 65504 and at 6e-8.
  static constexpr bool kHalf = std::is_same_v<T, __half>;
  static constexpr double kFar = kHalf ? 1e3 : 1e4, kOutlier = kHalf ? 1e4 : 1e6, kHuge = kHalf ? 0x1p10 : 1e30,
                          kTiny = kHalf ? 0x1p-16 : 1e-30;
  // The largest number, and what a few of overflow a sum in fp32; sums in fp64 hold it.
  static constexpr double kLimit = kHalf                              ? 65504
                                   : std::is_same_v<T, __nv_bfloat16> ? 0x1.FEp127
                                                                      : std::numeric_limits<A>::max(),
                          kLoud = std::is_same_v<T, double> ? 1e290 : kLimit / 16;

  int64_t cell_of(int64_t i) const { return i / g_.sample_numel() * g_.channels + i / g_.inner % g_.channels; }

  Buffer<T> values(const std::string& kind) {
    std::normal_distribution<double> normal;
    std::vector<double> centre(g_.cells()), spread(g_.cells());
    for (int64_t c = 0; c < g_.cells(); ++c) centre[c] = normal(random_), spread[c] = 0.5 + std::fabs(normal(random_));
    Buffer<T> buffer(g_.numel(), aligned_);
    for (int64_t i = 0; i < g_.numel(); ++i) {
      const int64_t c = cell_of(i);
      const bool first = i == g_.first_of(c);
      double value = centre[c] + spread[c] * normal(random_);
      if (kind == "shifted") value += kFar * spread[c];
      if (kind == "outlier" && first) value += kOutlier;
      if (kind == "constant") value = centre[c];
      if (kind == "huge") value *= kHuge;
      if (kind == "tiny") value *= kTiny;
      if (kind == "loud") value = kLoud * std::clamp(normal(random_), -4.0, 4.0);
      if (kind == "limit") value = kLimit * std::clamp(2 * value, -1.0, 1.0);
      if (kind == "spike") value = kLimit * (first ? -1.0 : 0.9);
      if (kind == "nan" && c == 0 && i == g_.sample_numel() - g_.channels * g_.inner) value = NAN;
      if (kind == "inf" && c == 0 && first) value = INFINITY;
      buffer[i] = narrow<T>(static_cast<A>(value));
    }
    return buffer;
  }

  PerChannel<T> parameters(double from, double to) {
    PerChannel<T> result(g_.cells(), settings_.is("parameters", "f32"));
    std::uniform_real_distribution<double> uniform(from, to);
    for (int64_t c = 0; c < g_.cells(); ++c) result.set(c, uniform(random_));
    return result;
  }

  // What (x - mean) * factor may lose besides, in A: a factor below the smallest normal number is rounded to a multiple
  // of the smallest one, and where x - mean may overflow the map is x * factor - mean * factor.
  Exact lost(Exact x, Exact mean, Exact factor) const {
    const Exact least = std::numeric_limits<A>::denorm_min(), largest = std::numeric_limits<A>::max();
    const bool overflows = std::fabs(mean) >= largest * kUnit / 2;
    return least / 2 * (std::fabs(x) + std::fabs(mean)) + (overflows ? kUnit * std::fabs(mean * factor) : 0);
  }

  // Sums over each channel of f(element).
  template <typename F>
  std::vector<Exact> sums(const F& f) const {
    std::vector<Exact> result(g_.cells());
    for (int64_t i = 0; i < g_.numel(); ++i) result[cell_of(i)] += f(i);
    return result;
  }

  // Of the elements of each channel. In units of std, squares of it for the variance:
  //   A      1, since each entry of a block is summed about a centre near its mean
  //   fp64   sqrt(1 + (x0 - mean)^2), and squared, since blocks are merged about the first element x0; and the mean
  std::vector<Statistics> of_batch() const {
    std::vector<Exact> mean = sums([&](int64_t i) { return widen(x_[i]); });
    for (Exact& value : mean) value /= n_;
    const std::vector<Exact> m2 = sums([&](int64_t i) { return std::pow(widen(x_[i]) - mean[cell_of(i)], Exact(2)); });
    return per_channel([&](int64_t c) {
      Statistics s = statistics(mean[c], m2[c] / n_);
      const Exact first = n_ > 0 ? (widen(x_[g_.first_of(c)]) - s.mean) / s.std : 0;
      const Exact merged = 1 + first * first;
      s.mean_error = walk_ * (kUnit + kMergeUnit * (std::sqrt(merged) + std::fabs(s.mean) / s.std));
      s.var_error = walk_ * (kUnit + kMergeUnit * merged);
      return s;
    });
  }

  // Of what lies in running_mean and running_var.
  std::vector<Statistics> of_running() const {
    return per_channel([&](int64_t c) { return statistics(running_mean_.get(c), running_var_.get(c)); });
  }

  // Of sums about 0, of which each is in two parts: [sum | rest | squares | rest | n].
  Statistics of_sums(const Buffer<double>& sums, int64_t c) const {
    const auto whole = [&](int64_t row) {
      return Exact(sums[row * g_.cells() + c]) + sums[(row + 1) * g_.cells() + c];
    };
    const Exact n = sums[4 * g_.cells()], mean = whole(0) / n, var = whole(2) / n - mean * mean;
    Statistics s = statistics(mean, var < 0 ? 0 : var);
    const Exact away = s.mean * s.mean / (s.std * s.std);
    s.mean_error = kMergeUnit * std::sqrt(away);
    s.var_error = 4 * (kMergeUnit + kExactUnit * away);
    return s;
  }

  // Of sums over more than the batch at hand.
  std::vector<Statistics> of_sums(const Buffer<double>& sums) const {
    return per_channel([&](int64_t c) { return of_sums(sums, c); });
  }

  Statistics statistics(Exact mean, Exact var) const {
    return {mean, var, std::sqrt(var + eps_), 0, 0, eps_ / (var + eps_)};
  }

  template <typename F>
  std::vector<Statistics> per_channel(const F& f) const {
    std::vector<Statistics> result;
    for (int64_t c = 0; c < g_.cells(); ++c) result.push_back(f(c));
    return result;
  }

  // Those of the batch as a part of `total` elements that are a little different.
  Buffer<double> larger_sums(Exact total) const {
    const std::vector<Statistics> batch = of_batch();
    Buffer<double> sums(4 * g_.cells() + 1);
    const auto set = [&](int64_t row, int64_t c, Exact value) {
      sums[row * g_.cells() + c] = static_cast<double>(value);
      sums[(row + 1) * g_.cells() + c] = static_cast<double>(value - sums[row * g_.cells() + c]);
    };
    for (int64_t c = 0; c < g_.cells(); ++c) {
      Exact mean = (n_ > 0 ? batch[c].mean : 0) + 0.1L;
      if (total == 1) mean = static_cast<float>(mean);  // whose square is exact: there is no variance
      const Exact var = total > 1 ? 1.1L * (n_ > 0 ? batch[c].var : 1) + 0.1L : 0;
      set(0, c, total * mean);
      set(2, c, total * (var + mean * mean));
    }
    sums[4 * g_.cells()] = static_cast<double>(total);
    return sums;
  }

  Exact total() const { return settings_.number("total") < 0 ? 2 * n_ : Exact(settings_.number("total")); }

  const Settings& settings_;
  Geometry g_;
  Exact n_;
  bool aligned_;
  double eps_;      // of the layer, not more than the variances
  Exact walk_ = 0;  // how far the roundings of a channel's sums go: known when it is known who adds up what
  std::mt19937 random_;
  Buffer<T> x_, dy_;
  PerChannel<T> weight_, bias_, running_mean_, running_var_;
  Buffer<T> residual_;
};

}  // namespace batchnorm_ext::cuda
