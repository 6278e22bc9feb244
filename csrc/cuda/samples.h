// Statistics of each sample: of a channel, instance normalization, or of several, group normalization.
#pragma once

#include "operands.h"

namespace batchnorm_ext::cuda {

// y and stats, of an x that is not empty.
Normalized normalize_samples(const Operands& o, const Spec& s);

// Writes those of the gradients that are defined.
void backward_of_samples(const Gradient& gradient, const OptionalTensor& weight, const Tensor& stats, bool training,
                         const Tensor& dx, const Tensor& dweight, const Tensor& dbias);

}  // namespace batchnorm_ext::cuda
