// The launch plans of csrc/cuda/planner.h, without a GPU. Exits with 2 and a message if BATCHNORM_EXT_CUDA_PLAN is
// wrong. A line of input describes one launch plan by numbers, in the order of the reads below; a line of CSV answers
// it. `loaded` and `stored` count elements of all tensors together, added up over the chunks of every block.
#include <cstdio>
#include <iostream>
#include <stdexcept>

#include "../csrc/cuda/planner.h"

namespace {

using namespace batchnorm_ext::cuda;

const char* name(Policy policy) {
  constexpr const char* kNames[] = {"block", "grid", "split", "reduce", "map"};
  return kNames[static_cast<int>(policy)];
}

// Packs (row) or rows of the tensor (column) that the blocks of a launch take, and those of them that they keep.
struct Taken {
  int64_t all = 0, kept = 0;
};

Taken taken(const Plan& plan, const Launch& launch) {
  const Shape& s = launch.shape;
  const bool row = plan.pattern == Pattern::kRow;
  const int64_t total = row ? s.geometry.outer * (s.geometry.inner / plan.pack) : s.geometry.outer;
  const int64_t room = int64_t{s.kept} * (row ? kThreads : s.rows_at_once.divisor);
  Taken taken;
  for (int64_t rank = 0; rank < s.ranks; ++rank) {
    const int64_t length = std::min(s.chunk, total - rank * s.chunk);
    taken.all += length;
    taken.kept += std::min(length, room);
  }
  return taken;
}

void answer_all() {
  const Override override = Override::from_text(Override::environment());
  Request request{};
  Device device;
  std::puts("pattern,policy,pack,ranks,teams,blocks,width,relay,shared_bytes,loaded,stored,rule");
  while (std::cin >> request.geometry.outer >> request.geometry.channels >> request.geometry.inner >>
         request.element_bytes >> request.kept_inputs >> request.coefficients >> request.aligned >> request.reduces >>
         request.maps >> device.architecture >> device.sms >> device.shared_per_sm >> device.shared_per_block >>
         device.l2 >> device.cooperative) {
    const Plan plan = Planner(request, device, override).plan();
    const Shape& s = plan.first.shape;
    const int64_t all_channels = plan.pattern == Pattern::kRow ? s.geometry.channels * plan.pack : s.stride;
    const Taken first = taken(plan, plan.first);
    int64_t loaded = first.all, stored = request.maps ? first.all : 0;
    if (plan.policy == Policy::kSplit) {
      const Taken second = taken(plan, plan.second);
      loaded += second.all;
      stored = second.all;
    } else if (request.reduces && request.maps) {
      loaded += first.all - first.kept;
    }
    std::printf("%s,%s,%d,%d,%d,%lld,%d,%d,%lld,%lld,%lld,%s\n", plan.pattern == Pattern::kRow ? "row" : "column",
                name(plan.policy), plan.pack, s.ranks, s.teams, static_cast<long long>(plan.first.blocks()), s.width,
                s.relay, static_cast<long long>(plan.first.shared_bytes),
                static_cast<long long>(request.kept_inputs * loaded * all_channels),
                static_cast<long long>(stored * all_channels), plan.rule);
  }
}

}  // namespace

int main() {
  try {
    answer_all();
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
