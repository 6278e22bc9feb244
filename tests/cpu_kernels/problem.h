// The tensors of one configuration, drawn at random, and what is known of their channels in higher precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/lanes.h"
#include "geometry.h"

namespace batchnorm_ext::cpu {

inline int64_t stream_bytes() { return int64_t{8} << 20; }  // memory.cpp takes PyTorch

enum class Data { kNormal, kShifted, kStep, kConstant, kHuge, kTiny };
constexpr const char* kDataNames[] = {"normal", "shifted", "step", "constant", "huge", "tiny"};

// Of a channel.
struct Statistics {
  Exact mean, var, std;  // std = sqrt(var + eps)
};

template <typename T>
struct Problem {
  using A = Acc<T>;
  static constexpr double kFar = std::is_same_v<T, c10::Half> ? 100 : 1e4, kScale = 1e30;  // float16 ends at 65504

  Problem(const Geometry& geometry, Data data)
      : g(geometry), eps(data == Data::kTiny ? 1e-5 / (kScale * kScale) : 1e-5), x(g.numel()), dy(g.numel(), 3) {
    std::normal_distribution<double> normal;
    for (int64_t c = 0; c < g.cells(); ++c) {
      weight.push_back(0.5 + std::fabs(normal(random)));
      bias.push_back(normal(random));
    }
    fill_x(data);
    for (int64_t i = 0; i < g.numel(); ++i) dy[i] = static_cast<T>(normal(random));
    statistics = of_batch();
    for (const Statistics& s : statistics) {
      mean.push_back(static_cast<double>(s.mean));
      invstd.push_back(static_cast<double>(1 / s.std));
    }
  }

  int64_t cell_of(int64_t i) const { return i / g.sample_numel() * g.channels + i / g.inner % g.channels; }

  // About the statistics that the kernels get, not those that there are.
  Exact xhat(int64_t i) const { return (Exact(x[i]) - mean[cell_of(i)]) * invstd[cell_of(i)]; }

  // Sums over each channel of f(element).
  template <typename F>
  std::vector<Exact> sums(const F& f) const {
    std::vector<Exact> result(g.cells());
    for (int64_t i = 0; i < g.numel(); ++i) result[cell_of(i)] += f(i);
    return result;
  }

  Geometry g;
  double eps;  // of the layer, not more than the variances
  std::mt19937 random{1};
  Buffer<T> x, dy;
  std::vector<double> weight, bias;
  std::vector<Statistics> statistics;
  std::vector<double> mean, invstd;

 private:
  void fill_x(Data data) {
    std::normal_distribution<double> normal;
    std::vector<double> centre(g.cells()), spread(g.cells());
    for (int64_t c = 0; c < g.cells(); ++c) centre[c] = normal(random), spread[c] = 0.5 + std::fabs(normal(random));
    std::vector<int64_t> seen(g.cells());
    for (int64_t i = 0; i < g.numel(); ++i) {
      const int64_t c = cell_of(i);
      double value = centre[c] + (data == Data::kConstant ? 0 : spread[c] * normal(random));
      if (data == Data::kShifted) value += kFar * spread[c];
      // Where a channel begins so differently, a lane loses nearly all of it that stays about its first centre.
      if (data == Data::kStep && seen[c]++ < kLanes<A> * kFirstTile) value += kFar;
      if (data == Data::kHuge) value *= kScale;
      if (data == Data::kTiny) value /= kScale;
      x[i] = static_cast<T>(value);
    }
  }

  std::vector<Statistics> of_batch() const {
    std::vector<Exact> means = sums([&](int64_t i) { return Exact(x[i]); });
    for (Exact& value : means) value /= g.count();
    const std::vector<Exact> m2 = sums([&](int64_t i) {
      const Exact difference = Exact(x[i]) - means[cell_of(i)];
      return difference * difference;
    });
    std::vector<Statistics> result;
    for (int64_t c = 0; c < g.cells(); ++c)
      result.push_back({means[c], m2[c] / g.count(), std::sqrt(m2[c] / g.count() + eps)});
    return result;
  }
};

}  // namespace batchnorm_ext::cpu
