// Which elements of a dense tensor share one mean and one variance.
//
// Flat memory is [batch, outer, channels, inner]. The elements of one index of `batch` and of `channels` are a cell;
// they run over `outer` and `inner`. A statistic covers `per_stat` adjacent cells. Batch normalization has one per
// channel:
//   (N, C, H, W) contiguous       batch = 1   outer = N        channels = C   inner = H*W   per_stat = 1
//   (N, C, H, W) channels_last    batch = 1   outer = N*H*W    channels = C   inner = 1     per_stat = 1
//   (N, C)                        batch = 1   outer = N        channels = C   inner = 1     per_stat = 1
// Group normalization has one per sample and group of channels; with groups of one channel it is instance
// normalization:
//   (N, C, H, W) contiguous       batch = N   outer = 1        channels = C   inner = H*W   per_stat = C/groups
//   (N, C, H, W) channels_last    batch = N   outer = H*W      channels = C   inner = 1     per_stat = C/groups
// Any other dense order of the dimensions, (N, L, C).transpose(1, 2) for one, falls out of the same rule: the
// dimensions stored outside the channel make up `outer`, those stored inside it make up `inner`.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace batchnorm_ext {

struct Geometry {
  int64_t outer = 0, channels = 0, inner = 0, batch = 1, per_stat = 1;

  BATCHNORM_EXT_HD int64_t cells() const { return batch * channels; }
  BATCHNORM_EXT_HD int64_t stats() const { return cells() / per_stat; }
  BATCHNORM_EXT_HD int64_t cell_count() const { return outer * inner; }       // elements of a cell
  BATCHNORM_EXT_HD int64_t count() const { return per_stat * cell_count(); }  // elements behind each statistic
  int64_t sample_numel() const { return outer * channels * inner; }           // elements of one index of `batch`
  int64_t numel() const { return batch * sample_numel(); }
  // The offset of the first element of a cell.
  BATCHNORM_EXT_HD int64_t first_of(int64_t cell) const {
    const int64_t sample = batch == 1 || outer == 1 ? 0 : cell / channels;
    return cell * inner + sample * (outer - 1) * channels * inner;
  }
  // The same statistics, with cells that lie one after the other taken as one.
  Geometry merged() const { return outer > 1 ? *this : Geometry{1, channels / per_stat, inner * per_stat, batch, 1}; }
  // The offset of element i of a cell, and of those that follow it.
  BATCHNORM_EXT_HD int64_t element_of(int64_t cell, int64_t i) const {
    const int64_t here = i % cell_count();
    return first_of(cell + i / cell_count()) + here / inner * channels * inner + here % inner;
  }
};

}  // namespace batchnorm_ext
