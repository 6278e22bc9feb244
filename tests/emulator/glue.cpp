// The CUDA side of the operators as a library for the host: the very files that make pointers of tensors, and the
// emulator in place of the GPU. They are registered for CUDA, and are called with tensors of the CPU.
#include <torch/library.h>

#include <string>
#include <vector>

#include "cuda/across.cu"
#include "cuda/norm.cu"
#include "cuda/planner.h"
#include "cuda/samples.cu"
#include "emulate.h"

namespace batchnorm_ext::cuda {
namespace {

Override override_in_force;

}  // namespace

template <typename Op>
void launch(const Op& op, const Request& request) {
  Device device;
  device.sms = 2;
  const Plan plan = Planner(request, device, override_in_force).plan();
  const Scratch sizes = plan.scratch();
  std::vector<unsigned> counters(sizes.counter_bytes / sizeof(unsigned));
  std::vector<double> scratch(sizes.bytes / sizeof(double));
  emulator::poison(scratch.data(), sizes.bytes);
  emulate(plan, op, counters.data(), scratch.data(), /*seed=*/1);
}

template <typename Op>
void launch_combine(const Op& op) {
  const auto blocks = static_cast<unsigned>((op.warps() + kWarps - 1) / kWarps);
  emulator::launch({.grid = {blocks}, .block = kThreads, .seed = 1}, combine_kernel<Op>, op);
}

template <typename Op>
int64_t launch_across(const Op& op, bool aligned, int64_t most) {
  return with_across_kernel<Op>(aligned, op.shape, most, [&](auto kernel, int64_t blocks, int64_t shared_bytes) {
    emulator::launch({.grid = {static_cast<unsigned>(blocks)},
                      .block = kThreads,
                      .shared_bytes = static_cast<std::size_t>(shared_bytes),
                      .seed = 1},
                     kernel, op);
  });
}

// The operator of resources.cpp.
TORCH_LIBRARY_FRAGMENT(batchnorm_ext, m) {
  m.def("_override_cuda_plan(str plan) -> str", [text = std::string()](std::string plan) mutable {
    override_in_force = Override::from_text(plan);
    text.swap(plan);
    return plan;
  });
}

}  // namespace batchnorm_ext::cuda
