// Between cells and what they share: a statistic covers cells of several channels, a parameter those of several
// samples. In fp64, in the order of the cells.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

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

// The moments of `width` cells become those of the statistics that cover them, in place. About the first mean, so that
// a constant has a variance of exactly 0.
inline void combine_moments(const Geometry& g, int64_t width, double* mean, double* m2) {
  const int64_t cells = g.per_stat;
  if (cells == 1) return;
  const double n = static_cast<double>(g.cell_count());
  for (int64_t s = 0; s < width / cells; ++s) {
    const double *const means = mean + s * cells, *const m2s = m2 + s * cells;
    double shift = 0, within = 0, between = 0;
    for (int64_t i = 0; i < cells; ++i) shift += means[i] - means[0];
    const double middle = means[0] + shift / static_cast<double>(cells);
    for (int64_t i = 0; i < cells; ++i) {
      const double d = means[i] - middle;
      within += m2s[i];
      between += d * d;
    }
    mean[s] = middle;
    m2[s] = within + n * between;
  }
}

// The values of each channel in all samples become their sum, in the first sample.
inline void sum_over_batch(const Geometry& g, double* values) {
  for (int64_t i = g.channels; i < g.cells(); ++i) values[i % g.channels] += values[i];
}

}  // namespace batchnorm_ext::cpu
