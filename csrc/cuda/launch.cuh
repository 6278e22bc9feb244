// Behind launch.h.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "across.cuh"
#include "combine.cuh"
#include "launch.h"
#include "norm.cuh"
#include "resources.h"

namespace batchnorm_ext::cuda {

template <typename Op>
void launch(const Op& op, const Request& request) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Resources resources = acquire(request, stream);
  const Plan& plan = resources.plan;
  const Scratch scratch = plan.scratch();
  const Workspace workspace(resources.counters, resources.scratch.get(), scratch);
  bool refused = false;
  run(plan, op, Workspace::at<double>(resources.scratch.get(), scratch.between),
      [&]<Phase phase>(const Launch& how, const auto& part) {
        with_kernel<phase, std::remove_cvref_t<decltype(part)>>(plan, [&](auto kernel) {
          allow_shared_memory(reinterpret_cast<const void*>(kernel));
          cudaLaunchAttribute attribute{};
          attribute.id = cudaLaunchAttributeCooperative;
          attribute.val.cooperative = plan.policy == Policy::kGrid;
          cudaLaunchConfig_t config{};
          config.gridDim = dim3(how.shape.teams, how.shape.ranks);
          config.blockDim = dim3(kThreads);
          config.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
          config.stream = stream;
          config.attrs = &attribute;
          config.numAttrs = 1;
          const cudaError_t status = cudaLaunchKernelEx(&config, kernel, how.shape, part, workspace);
          refused = attribute.val.cooperative != 0 &&
                    (status == cudaErrorCooperativeLaunchTooLarge || status == cudaErrorNotSupported);
          if (!refused) C10_CUDA_CHECK(status);
        });
      });
  if (!refused) return;
  static_cast<void>(cudaGetLastError());  // clears it
  refuse_cooperation();
  launch(op, request);
}

template <typename Op>
void launch_combine(const Op& op) {
  const auto blocks = static_cast<unsigned>((op.warps() + kWarps - 1) / kWarps);
  combine_kernel<<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(op);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Op>
int64_t launch_across(const Op& op, bool aligned, int64_t most) {
  return with_across_kernel<Op>(aligned, op.shape, most, [&](auto kernel, int64_t blocks, int64_t shared_bytes) {
    kernel<<<static_cast<unsigned>(blocks), kThreads, shared_bytes, c10::cuda::getCurrentCUDAStream()>>>(op);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace batchnorm_ext::cuda
