// What a launch needs beside its tensors: a plan, counters that are zero, memory that its blocks share.
#pragma once

#include <c10/core/Allocator.h>
#include <cuda_runtime_api.h>

#include "plan.h"

namespace batchnorm_ext::cuda {

struct Resources {
  Plan plan;
  void* counters;
  c10::DataPtr scratch;
};

// For the current device. Without memory for the blocks to share, the plan is one that needs next to none.
Resources acquire(const Request& request, cudaStream_t stream);

// From now on, no plan for the current device asks for blocks that are resident at the same time.
void refuse_cooperation();

// Lets a kernel use all the shared memory that a block of the current device may have.
void allow_shared_memory(const void* kernel);

}  // namespace batchnorm_ext::cuda
