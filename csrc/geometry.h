// How a dense tensor is cut into the groups of elements that share one mean and one variance.
//
// Flat memory is viewed as [outer, stats, inner]: one statistic per index of `stats`, reduced over the other two.
//   (N, C, H, W) contiguous       outer = N        stats = C   inner = H*W
//   (N, C, H, W) channels_last    outer = N*H*W    stats = C   inner = 1
//   (N, C)                        outer = N        stats = C   inner = 1
// Any other dense order of the dimensions, (N, L, C).transpose(1, 2) for one, falls out of the same rule: the
// dimensions stored outside the channel make up `outer`, those stored inside it make up `inner`.
#pragma once

#include <cstdint>

namespace batchnorm_ext {

struct Geometry {
  int64_t outer = 0, stats = 0, inner = 0;

  int64_t count() const { return outer * inner; }  // elements behind each statistic
  int64_t numel() const { return outer * stats * inner; }
};

}  // namespace batchnorm_ext
