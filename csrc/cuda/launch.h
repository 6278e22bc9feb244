// Launches on the current stream of the current device. Instantiated once for each dtype, in kernels_*.cu.
#pragma once

#include "plan.h"

namespace batchnorm_ext::cuda {

// An op of forward.cuh, backward.cuh or activated.cuh.
template <typename Op>
void launch(const Op& op, const Request& request);

// An op of combine.cuh.
template <typename Op>
void launch_combine(const Op& op);

// An op of across.cuh, in at most `most` blocks; 0: as many as there are strips. Returns their number.
template <typename Op>
int64_t launch_across(const Op& op, bool aligned, int64_t most);

}  // namespace batchnorm_ext::cuda
