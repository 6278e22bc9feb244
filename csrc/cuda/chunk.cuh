// Where the packs of a block lie: its share of a group of channels, and the part of each thread in it. Both patterns
// offer the same:
//   steps         packs of this thread
//   offset(step)  where a pack begins, in elements from the start of the tensor
//   slot(step)    where the block keeps it
//   channel(lane) the channel, counted from `first`, of an element of this thread's packs
// and for what is summed again in fp64, count() elements of a channel, element(channel, i). A chunk has fewer than 2^30
// elements, the tensor may have more than 2^32.
#pragma once

#include "device.cuh"
#include "shape.h"

namespace batchnorm_ext::cuda {

__device__ __forceinline__ uint32_t divide(const Divider& d, uint32_t n) {
  return (__umulhi(n, d.multiplier) + n) >> d.shift;
}

// One channel, in long runs: consecutive packs go to consecutive threads.
template <int kWidth>
struct RowChunk {
  static constexpr bool kRow = true;
  static constexpr int kLanes = 1;  // all elements of a pack belong together

  __device__ __forceinline__ RowChunk(const Shape& s, int64_t group, int rank)
      : run(s.run), stride(s.stride), first(group) {
    const int64_t begin = rank * s.chunk, row = begin / run.divisor, left = s.geometry.outer * run.divisor - begin;
    packs = static_cast<int>(left < s.chunk ? left : s.chunk);
    start = static_cast<uint32_t>(begin - row * run.divisor);
    base = row * stride + group * s.geometry.inner;
    const int thread = threadIdx.x;
    steps = packs > thread ? (packs - thread + kThreads - 1) / kThreads : 0;
  }

  __device__ __forceinline__ int64_t offset_of(int pack) const {
    const uint32_t at = start + static_cast<uint32_t>(pack), row = divide(run, at);
    return base + row * stride + static_cast<int64_t>(at - row * run.divisor) * kWidth;
  }
  __device__ __forceinline__ int64_t offset(int step) const { return offset_of(slot(step)); }
  __device__ __forceinline__ int slot(int step) const { return step * kThreads + static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int channel(int) const { return 0; }
  __device__ __forceinline__ int channels() const { return 1; }

  __device__ __forceinline__ int count() const { return packs * kWidth; }
  __device__ __forceinline__ int entry_count() const { return count(); }
  __device__ __forceinline__ int64_t element(int, int i) const { return offset_of(i / kWidth) + i % kWidth; }

  Divider run;
  int64_t stride, first, base;
  uint32_t start;
  int packs, steps;
};

// Several channels in short runs: every thread stays in its column of packs and walks down the rows.
template <int kWidth>
struct ColumnChunk {
  static constexpr bool kRow = false;
  static constexpr int kLanes = kWidth;

  __device__ __forceinline__ ColumnChunk(const Shape& s, int64_t group, int rank)
      : inner(s.inner), stride(s.stride), first(group * s.width), rows_at_once(s.rows_at_once) {
    const int64_t left = s.geometry.stats - first, row = rank * s.chunk, below = s.geometry.outer - row;
    width = static_cast<int>(left < s.width ? left : s.width);
    rows = static_cast<int>(below < s.chunk ? below : s.chunk);
    const int thread = threadIdx.x;
    lane_row = thread / s.columns;
    column = thread - lane_row * s.columns;
    base = row * stride + first * inner.divisor;
    const bool active = lane_row < rows_at_once && lane_row < rows && column < columns();
    steps = active ? (rows - lane_row + rows_at_once - 1) / rows_at_once : 0;
  }

  __device__ __forceinline__ int64_t offset(int step) const {
    return base + (lane_row + static_cast<int64_t>(step) * rows_at_once) * stride + column * kWidth;
  }
  __device__ __forceinline__ int slot(int step) const { return step * kThreads + static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int channel(int lane) const {
    return static_cast<int>(divide(inner, static_cast<uint32_t>(column * kWidth + lane)));
  }
  __device__ __forceinline__ int channels() const { return width; }
  // Packs in a row of this group, which may be narrower than the others.
  __device__ __forceinline__ int columns() const { return width * static_cast<int>(inner.divisor) / kWidth; }

  __device__ __forceinline__ int count() const { return rows * static_cast<int>(inner.divisor); }
  __device__ __forceinline__ int entry_count() const { return rows; }
  __device__ __forceinline__ int64_t element(int channel, int i) const {
    const int row = static_cast<int>(divide(inner, i)), run = static_cast<int>(inner.divisor);
    return base + row * stride + (channel - row) * run + i;
  }

  Divider inner;
  int64_t stride, first, base;
  int rows_at_once, width, rows, lane_row, column, steps;
};

}  // namespace batchnorm_ext::cuda
