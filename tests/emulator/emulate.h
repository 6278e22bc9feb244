// The launches of a plan, in the emulator.
#pragma once

#include <emulator.h>  // by the search path: a copy with an error in it comes first

#include <cstddef>
#include <cstdint>

#include "cuda/norm.cuh"

namespace batchnorm_ext::cuda {

// What the launches of a plan share lies in `counters` and `scratch`. The schedule of each launch has a seed of its
// own, from `seed` on.
template <typename Op>
void emulate(const Plan& plan, const Op& op, void* counters, void* scratch, std::uint64_t seed) {
  const Scratch sizes = plan.scratch();
  const Workspace workspace(counters, scratch, sizes);
  run(plan, op, Workspace::at<double>(scratch, sizes.between), [&]<Phase phase>(const Launch& how, const auto& part) {
    with_kernel<phase, std::remove_cvref_t<decltype(part)>>(plan, [&](auto kernel) {
      emulator::launch({.grid = {static_cast<unsigned>(how.shape.teams), static_cast<unsigned>(how.shape.ranks)},
                        .block = kThreads,
                        .shared_bytes = static_cast<std::size_t>(how.shared_bytes),
                        .cooperative = phase == Phase::kFused && how.shape.ranks > 1,
                        .seed = seed++},
                       kernel, how.shape, part, workspace);
    });
  });
}

}  // namespace batchnorm_ext::cuda
