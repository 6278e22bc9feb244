// Launches on the current stream of the current device. Instantiated once for each dtype, in kernels_*.cu.
#pragma once

#include "plan.h"

namespace batchnorm_ext::cuda {

// An op of forward.cuh or backward.cuh.
template <typename Op>
void launch(const Op& op, const Request& request);

// An op of combine.cuh.
template <typename Op>
void launch_combine(const Op& op);

}  // namespace batchnorm_ext::cuda
