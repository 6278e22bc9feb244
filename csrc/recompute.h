// Whether a forward runs for the second time.
#pragma once

#include <torch/csrc/autograd/graph_task.h>

namespace batchnorm_ext {

// Within a backward pass, a forward is that of activation checkpointing: the first one has tracked the batch.
inline bool recomputes_forward() { return torch::autograd::get_current_graph_task_id() != -1; }

}  // namespace batchnorm_ext
