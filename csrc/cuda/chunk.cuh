// Where the packs of a block lie: its share of a group of channels, and the part of each thread in it. Both patterns
// offer the same:
//   steps         packs of this thread
//   offset(step)  where a pack begins, in elements from the start of the tensor
//   channel(lane) the channel, counted from `first`, of an element of this thread's packs
//   entries()     of each channel, of entry_count(i) elements (see reduce.cuh)
// and for what is summed again in fp64, count() elements of a channel, element(channel, i). A chunk has fewer than 2^30
// elements, the tensor may have more than 2^32.
#pragma once

#include "device.cuh"
#include "shape.h"

namespace batchnorm_ext::cuda {

constexpr int64_t kDivisible = int64_t{1} << 31;  // what divide() is exact for

__device__ __forceinline__ uint32_t divide(const Divider& d, uint32_t n) {
  return (__umulhi(n, d.multiplier) + n) >> d.shift;
}

// One channel, in long runs: consecutive packs go to consecutive threads.
template <int kWidth>
struct RowChunk {
  static constexpr bool kRow = true;
  static constexpr int kLanes = 1;  // all elements of a pack belong together

  __device__ __forceinline__ RowChunk(const Shape& s, int group, int rank) : s(s), first(group) {
    const int64_t begin = rank * s.chunk, left = s.geometry.outer * s.run.divisor - begin;
    const int64_t row = begin < kDivisible ? divide(s.run, static_cast<uint32_t>(begin)) : begin / s.run.divisor;
    packs = static_cast<int>(left < s.chunk ? left : s.chunk);
    start = static_cast<uint32_t>(begin - row * s.run.divisor);
    base = row * s.stride + s.geometry.first_of(group);
    const int thread = threadIdx.x;
    steps = packs > thread ? (packs - thread + kThreads - 1) / kThreads : 0;
  }

  __device__ __forceinline__ int64_t offset_of(int pack) const {
    const uint32_t at = start + static_cast<uint32_t>(pack), row = divide(s.run, at);
    return base + row * s.stride + static_cast<int64_t>(at - row * s.run.divisor) * kWidth;
  }
  __device__ __forceinline__ int64_t offset(int step) const {
    return offset_of(step * kThreads + static_cast<int>(threadIdx.x));
  }
  __device__ __forceinline__ int channel(int) const { return 0; }
  __device__ __forceinline__ int channels() const { return 1; }

  __device__ __forceinline__ int count() const { return packs * kWidth; }
  // One for each warp that has packs.
  __device__ __forceinline__ int entries() const { return packs < kThreads ? (packs + kWarp - 1) / kWarp : kWarps; }
  __device__ __forceinline__ int entry_count(int warp) const {
    const int last = packs % kThreads - warp * kWarp;  // of its threads take part in the last step
    return (packs / kThreads * kWarp + (last < 0 ? 0 : last < kWarp ? last : kWarp)) * kWidth;
  }
  __device__ __forceinline__ int64_t element(int, int i) const { return offset_of(i / kWidth) + i % kWidth; }

  const Shape& s;
  int64_t base;
  uint32_t start;
  int first, packs, steps;
};

// Several channels in short runs: every thread stays in its column of packs and walks down the rows.
template <int kWidth>
struct ColumnChunk {
  static constexpr bool kRow = false;
  static constexpr int kLanes = kWidth;

  __device__ __forceinline__ ColumnChunk(const Shape& s, int group, int rank) : s(s) {
    const int sample = group / s.groups_per_sample, channel = (group - sample * s.groups_per_sample) * s.width;
    const int64_t row = rank * s.chunk, below = s.geometry.outer - row, left = s.geometry.channels - channel;
    first = sample * static_cast<int>(s.geometry.channels) + channel;
    width = static_cast<int>(left < s.width ? left : s.width);
    rows = static_cast<int>(below < s.chunk ? below : s.chunk);
    lane_row = divide(s.columns, threadIdx.x);
    column = threadIdx.x - lane_row * s.columns.divisor;
    base = row * s.stride + s.geometry.first_of(first);
    const int at_once = s.rows_at_once.divisor;
    const bool active = lane_row < at_once && lane_row < rows && column < columns();
    steps = active ? divide(s.rows_at_once, rows - lane_row + at_once - 1) : 0;
  }

  __device__ __forceinline__ int64_t offset(int step) const {
    return base + static_cast<int64_t>(lane_row + step * static_cast<int>(s.rows_at_once.divisor)) * s.stride +
           column * kWidth;
  }
  __device__ __forceinline__ int channel(int lane) const {
    return static_cast<int>(divide(s.inner, static_cast<uint32_t>(column * kWidth + lane)));
  }
  __device__ __forceinline__ int channels() const { return width; }
  // Packs in a row of this group, which may be narrower than the others.
  __device__ __forceinline__ int columns() const { return width * static_cast<int>(s.inner.divisor) / kWidth; }

  __device__ __forceinline__ int count() const { return rows * static_cast<int>(s.inner.divisor); }
  __device__ __forceinline__ int entries() const { return s.inner.divisor; }
  __device__ __forceinline__ int entry_count(int) const { return rows; }
  __device__ __forceinline__ int64_t element(int channel, int i) const {
    const int row = static_cast<int>(divide(s.inner, i)), run = static_cast<int>(s.inner.divisor);
    return base + row * s.stride + (channel - row) * run + i;
  }

  const Shape& s;
  int64_t base;
  int first, width, rows, lane_row, column, steps;
};

}  // namespace batchnorm_ext::cuda
