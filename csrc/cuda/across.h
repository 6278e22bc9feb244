// Layer normalization over the channels of images, as (N, positions, channels) with a statistic for each position.
#pragma once

#include "operands.h"

namespace batchnorm_ext::cuda {

// y and stats, of an x that is not empty.
Normalized normalize_across(const Operands& o, const Spec& s);

Gradients backward_across(const Tensor& grad, const Tensor& input, const OptionalTensor& weight, const Tensor& stats,
                          const Mask& mask, std::optional<at::ScalarType> bias_dtype);

}  // namespace batchnorm_ext::cuda
