// Between cells and what they share: a statistic covers cells of several channels, a parameter those of several
// samples. In fp64, in the order of the cells.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "../combine.h"
#include "../geometry.h"

namespace batchnorm_ext::cpu {

// One value per cell from one per statistic. Where each statistic has one cell these are the same array.
class PerCell {
 public:
  PerCell(const Geometry& g, const double* stats)
      : stats_(stats), per_stat_(g.per_stat), own_(per_stat_ > 1 ? new double[g.cells()] : nullptr) {}

  const double* get() const { return own_ ? own_.get() : stats_; }

  // Sets cells [first, first + width), those of whole statistics.
  void set(int64_t first, int64_t width) const {
    if (!own_) return;
    for (int64_t i = first; i < first + width; i += per_stat_) std::fill_n(&own_[i], per_stat_, stats_[i / per_stat_]);
  }

 private:
  const double* stats_;
  int64_t per_stat_;
  std::unique_ptr<double[]> own_;
};

// Adds up f(0), f(1)... in this order.
inline auto sum_of_cells(int64_t cells) {
  return [cells](const auto& f) {
    double sum = 0;
    for (int64_t i = 0; i < cells; ++i) sum += f(i);
    return sum;
  };
}

// The moments of `width` cells become those of the statistics that cover them, in place.
inline void combine_moments(const Geometry& g, int64_t width, double* mean, double* m2) {
  const int64_t cells = g.per_stat;
  if (cells == 1) return;
  for (int64_t s = 0; s < width / cells; ++s) {
    const auto at = [first = s * cells](const double* of) { return [=](int64_t i) { return of[first + i]; }; };
    const Moments moments = batchnorm_ext::combine_moments(cells, static_cast<double>(g.cell_count()), at(mean), at(m2),
                                                           sum_of_cells(cells));
    mean[s] = moments.mean;
    m2[s] = moments.scaled_m2;
  }
}

// The values of each channel in all samples become their sum, in the first sample.
inline void sum_over_batch(const Geometry& g, double* values) {
  for (int64_t i = g.channels; i < g.cells(); i += g.channels)
    for (int64_t c = 0; c < g.channels; ++c) values[c] += values[i + c];
}

}  // namespace batchnorm_ext::cpu
