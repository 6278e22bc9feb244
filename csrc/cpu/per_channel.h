// Tensors with one value per channel, of any of the floating dtypes, as arrays of fp64 with one value per cell.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>

#include "../dtype.h"
#include "../geometry.h"
#include "../ops.h"

namespace batchnorm_ext::cpu {

using Channels = std::unique_ptr<double[]>;

// All values, for each sample; an absent tensor reads as `absent` everywhere.
inline Channels read_channels(const OptionalTensor& tensor, int64_t channels, double absent, int64_t batch = 1) {
  Channels values(new double[std::max<int64_t>(1, batch) * channels]);
  if (!tensor) {
    std::fill_n(values.get(), batch * channels, absent);
    return values;
  }
  const int64_t stride = tensor->stride(0);
  with_dtype(tensor->scalar_type(), [&](auto like) {
    using scalar_t = decltype(like);
    const scalar_t* const from = tensor->const_data_ptr<scalar_t>();
    for (int64_t c = 0; c < channels; ++c) values[c] = static_cast<double>(from[c * stride]);
  });
  for (int64_t sample = 1; sample < batch; ++sample) std::copy_n(&values[0], channels, &values[sample * channels]);
  return values;
}

inline void write_channels(const at::Tensor& tensor, int64_t channels, const double* values) {
  const int64_t stride = tensor.stride(0);
  with_dtype(tensor.scalar_type(), [&](auto like) {
    using scalar_t = decltype(like);
    scalar_t* const to = static_cast<scalar_t*>(tensor.data_ptr());
    for (int64_t c = 0; c < channels; ++c) to[c * stride] = static_cast<scalar_t>(values[c]);
  });
}

// Moves the running statistics to those of `count` elements per cell, of which each channel has one per sample: to
// their average. Counts the batch. A single element has no unbiased variance: it leaves the running one as it is.
inline void track(const Operands& o, const Spec& s, const Geometry& g, double count, const double* mean,
                  const double* var) {
  if (!s.update) return;
  double factor = 0;
  if (o.num_batches_tracked) factor = 1.0 / static_cast<double>(++*o.num_batches_tracked->mutable_data_ptr<int64_t>());
  if (s.momentum) factor = *s.momentum;
  const auto move = [&](const at::Tensor& running, const double* to, double scale) {
    const Channels values = read_channels(running, g.channels, 0);
    for (int64_t c = 0; c < g.channels; ++c) {
      double average = 0;
      for (int64_t i = c; i < g.cells(); i += g.channels) average += to[i] / static_cast<double>(g.batch);
      values[c] = (1 - factor) * values[c] + factor * (average * scale);
    }
    write_channels(running, g.channels, values.get());
  };
  move(*o.running_mean, mean, 1);
  if (count > 1) move(*o.running_var, var, count / (count - 1));
}

// The data of what may be absent.
template <typename T>
const T* read(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

}  // namespace batchnorm_ext::cpu
