// From the packs of a thread to the sums of a block: lanes of threads, pairs per entry, fp64 per channel. The order of
// every sum is fixed by the plan.
//
// An entry is a set of elements of one channel: of a warp in a row, of an element's column in a column. Its sums are
// about a centre of its own, near its mean: about a centre z standard deviations from the mean, the relative error of
// the variance grows by 1 + z^2, and a single thread may have begun with an outlier.
#pragma once

#include "chunk.cuh"
#include "lanes.cuh"

namespace batchnorm_ext::cuda {

constexpr unsigned kFullMask = 0xffffffffu;

template <typename V>
__device__ __forceinline__ V warp_sum(V value, int lanes = kWarp) {
  for (lanes /= 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kFullMask, value, lanes);
  return value;
}

// An array of the block in shared memory.
template <typename V>
__device__ __forceinline__ V* shared_at(int32_t offset) {
  return reinterpret_cast<V*>(dynamic_shared<unsigned char>() + offset);
}

// Adds up `count` pairs of each channel, with 2^bits threads a channel. put(channel, sum, writes) is called by whole
// warps, so that it may use them; the sum is that of every thread's own channel, to be written by one of them.
template <typename Get, typename Put>
__device__ __forceinline__ void fold(int channels, int count, int bits, const Get& get, const Put& put) {
  const int thread = threadIdx.x, lanes = 1 << bits, lane = thread & (lanes - 1);
#pragma unroll 1
  for (int first = 0; first < channels; first += kThreads >> bits) {
    const int channel = first + (thread >> bits);
    double2 sum{0, 0};
    if (channel < channels)
#pragma unroll 4
      for (int i = lane; i < count; i += lanes) {
        const double2 pair = get(channel, i);
        sum = {sum.x + pair.x, sum.y + pair.y};
      }
    sum = {warp_sum(sum.x, lanes), warp_sum(sum.y, lanes)};
    put(channel, sum, channel < channels && lane == 0);
  }
}

// The sums of a channel in this chunk about `origin` in fp64, by a whole warp: for the rare values whose products leave
// the range of fp32.
template <typename Op, typename Chunk>
__device__ __forceinline__ double2 resum(const Chunk& chunk, const Op& op, int channel, double origin) {
  double2 sum{0, 0};
#pragma unroll 1
  for (int i = threadIdx.x % kWarp; i < chunk.count(); i += kWarp) {
    const double2 terms = op.terms(chunk.first + channel, chunk.element(channel, i), origin);
    sum.x += terms.x;
    sum.y += terms.y;
  }
  return {warp_sum(sum.x), warp_sum(sum.y)};
}

// Entries of a row: one per warp, about the mean of its threads' centres.
template <typename Op, typename Lanes, int kWidth>
__device__ __forceinline__ void gather(const Shape& s, const RowChunk<kWidth>& chunk, const Lanes& lanes) {
  using A = typename Op::A;
  const int warp = threadIdx.x / kWarp;
  A centre = 0;
  if constexpr (Op::kMoments) {
    const int active = __popc(__ballot_sync(kFullMask, chunk.steps > 0));  // the first ones of the warp
    const A first = __shfl_sync(kFullMask, lanes.k[0], 0);
    centre = first + warp_sum(chunk.steps > 0 ? lanes.k[0] - first : 0) / static_cast<A>(active > 0 ? active : 1);
  }
  const Pair<A> pair = lanes.about(0, chunk.steps * kWidth, centre);
  const Pair<A> sum{warp_sum(pair.a), warp_sum(pair.b)};
  if (threadIdx.x % kWarp == 0) {
    shared_at<A>(s.layout.centre)[warp] = centre;
    shared_at<Pair<A>>(s.layout.entries)[warp] = sum;
  }
  __syncthreads();
}

// Entries of a column: one per element of the group's row, about the mean of the centres of some threads of that
// column. A few lanes of all threads at a time pass through shared memory.
template <typename Op, typename Lanes, int kWidth>
__device__ __forceinline__ void gather(const Shape& s, const ColumnChunk<kWidth>& chunk, const Lanes& lanes) {
  using A = typename Op::A;
  constexpr int kPass = kWidth < kPassLanes ? kWidth : kPassLanes;
  static_assert(kWidth <= 2 * kPass, "the centres of all threads have room where their sums will be");
  A* const centre = shared_at<A>(s.layout.centre);
  Pair<A>* const sums = shared_at<Pair<A>>(s.layout.sums);
  Pair<A>* const parts = shared_at<Pair<A>>(s.layout.parts);
  Pair<A>* const entries = shared_at<Pair<A>>(s.layout.entries);
  const int thread = threadIdx.x, first = chunk.column * kWidth, outputs = s.outputs.divisor;
  const int rows = chunk.rows < static_cast<int>(s.rows_at_once.divisor)
                       ? chunk.rows
                       : s.rows_at_once.divisor;  // that have summed something
  const int used = chunk.columns() * kPass;       // of the outputs: the last group may be narrower
  const bool active = chunk.steps > 0;
  if constexpr (Op::kMoments) {
    A* const centres = shared_at<A>(s.layout.sums);  // of threads, before their sums
    const int width = s.columns.divisor * kWidth, some = rows < kCentreRows ? rows : kCentreRows;
    if (active && chunk.lane_row < some)
#pragma unroll
      for (int l = 0; l < kWidth; ++l) centres[chunk.lane_row * width + first + l] = lanes.k[l];
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < chunk.columns() * kWidth; i += kThreads) {
      A away = 0;
#pragma unroll 4
      for (int row = 1; row < some; ++row) away += centres[row * width + i] - centres[i];
      centre[i] = centres[i] + away / static_cast<A>(some);
    }
    __syncthreads();
  }
#pragma unroll
  for (int pass = 0; pass < kWidth; pass += kPass) {
    if (active)
#pragma unroll
      for (int l = 0; l < kPass; ++l)
        sums[chunk.lane_row * outputs + chunk.column * kPass + l] =
            lanes.about(pass + l, chunk.steps, centre[first + pass + l]);
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < outputs * s.splits; i += kThreads) {
      const int split = divide(s.outputs, i), output = i - split * outputs;
      Pair<A> sum{0, 0};
      if (output < used)
#pragma unroll 2
        for (int row = split; row < rows; row += s.splits) {
          const Pair<A> pair = sums[row * outputs + output];
          sum = {sum.a + pair.a, sum.b + pair.b};
        }
      parts[i] = sum;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < used; i += kThreads) {
      Pair<A> sum = parts[i];
#pragma unroll 2
      for (int split = 1; split < s.splits; ++split) {
        const Pair<A> pair = parts[split * outputs + i];
        sum = {sum.a + pair.a, sum.b + pair.b};
      }
      entries[i / kPass * kWidth + pass + i % kPass] = sum;
    }
    // The next pass writes `sums`, which were read before the last barrier, and waits before it writes `parts`.
  }
  __syncthreads();
}

// Leaves the sums of the block about each channel's origin in `totals`.
template <typename Op, typename Chunk, typename Lanes>
__device__ __forceinline__ void sum_block(const Shape& s, const Op& op, const Chunk& chunk, const Lanes& lanes) {
  using A = typename Op::A;
  gather<Op>(s, chunk, lanes);
  const A* const centre = shared_at<A>(s.layout.centre);
  const double* const origins = shared_at<double>(s.layout.origins);
  const Pair<A>* const entries = shared_at<Pair<A>>(s.layout.entries);
  double2* const totals = shared_at<double2>(s.layout.totals);
  const int count = chunk.entries();
  const double most = chunk.count();
  const auto get = [&](int channel, int i) {
    const int at = channel * count + i;
    const double e = Op::kMoments ? static_cast<double>(centre[at]) - origins[channel] : 0;
    return Lanes::about_origin(entries[at], chunk.entry_count(i), most, e);
  };
  const auto put = [&](int channel, double2 sum, bool writes) {
    if constexpr (Op::kResums) {
      const bool loses = writes && op.loses(chunk.first + channel, sum, most);
      for (unsigned lost = __ballot_sync(kFullMask, loses); lost != 0; lost &= lost - 1) {
        const int which = __shfl_sync(kFullMask, channel, __ffs(lost) - 1);
        const double origin = Op::kMoments ? origins[which] : op.origin(chunk.first + which);
        const double2 again = resum(chunk, op, which, origin);
        if (channel == which) sum = again;
      }
    }
    if (writes) totals[channel] = sum;
  };
  fold(chunk.channels(), count, s.entry_bits, get, put);
  __syncthreads();
}

}  // namespace batchnorm_ext::cuda
