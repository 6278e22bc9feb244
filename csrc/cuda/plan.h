// Host side: what is asked of a launch, and how the tensor is cut up for it. planner.h makes the plans.
#pragma once

#include <cstdint>

#include "override.h"

namespace batchnorm_ext::cuda {

enum class Pattern { kRow, kColumn };

struct Device {
  int architecture = 90;  // 10 * major + minor
  int sms = 132;
  int64_t shared_per_sm = 228 << 10, shared_per_block = 227 << 10, l2 = 50 << 20;
  bool cooperative = true;
};

struct Request {
  Geometry geometry;
  int element_bytes;
  int kept_inputs;  // that may stay on chip from the reduction to the map
  int coefficients;
  bool aligned;        // every tensor starts at a multiple of 16 bytes
  bool reduces, maps;  // at least one of them
};

struct Launch {
  Shape shape;
  int64_t shared_bytes;

  int64_t blocks() const { return int64_t{shape.teams} * shape.ranks; }  // a grid of these two dimensions
};

// Global memory that the blocks of a plan share. The counters are apart, since they have to be zero before their first
// launch, and are so again after each. The rest begins with the sums of the blocks; offsets in bytes.
struct Scratch {
  int64_t counter_bytes, totals, between, bytes;
};

struct Plan {
  Pattern pattern;
  Policy policy;
  int pack;  // elements
  const char* rule;
  Launch first, second;  // the second for kSplit alone

  Scratch scratch() const {
    const Shape& s = first.shape;
    const int64_t teams = s.ranks > 1 ? s.teams : 0, pair = 2 * sizeof(double);
    Scratch scratch{};
    scratch.counter_bytes = (1 + teams) * kCounterBytes;  // a ticket, and one for each team
    scratch.totals = 2 * teams * s.width * s.ranks * pair;
    scratch.between = scratch.totals + teams * s.width * pair;
    scratch.bytes = scratch.between + (policy == Policy::kSplit ? s.geometry.cells() * pair : 0);
    return scratch;
  }
};

}  // namespace batchnorm_ext::cuda
