// Launches an op of forward.cuh or backward.cuh on the current stream of the current device. Instantiated once for each
// dtype, in kernels_*.cu.
#pragma once

#include "plan.h"

namespace batchnorm_ext::cuda {

template <typename Op>
void launch(const Op& op, const Request& request);

}  // namespace batchnorm_ext::cuda
