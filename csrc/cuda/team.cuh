// The blocks of a team: what they tell each other through global memory.
#pragma once

#include "plan.h"
#include "reduce.cuh"

namespace batchnorm_ext::cuda {

// Counters are zero before the first launch, and whole rounds leave them so but for the top bit.
struct Workspace {
  Workspace() = default;
  Workspace(void* counters, void* memory, const Scratch& scratch)
      : ticket(static_cast<unsigned*>(counters)),
        counters(ticket + kCounterBytes / sizeof(unsigned)),
        parts(at<double2>(memory, 0)),
        totals(at<double2>(memory, scratch.totals)) {}

  unsigned* ticket;    // of the leaders
  unsigned* counters;  // [teams], each in a cache line of its own
  double2* parts;      // [2, teams, width, ranks]: sums of the blocks; two halves, for one group and the next
  double2* totals;     // [teams, width]: sums of the groups

  __device__ __forceinline__ unsigned* counter(int team) const {
    return counters + team * (kCounterBytes / sizeof(unsigned));
  }

  template <typename V>
  static V* at(void* memory, int64_t offset) {
    return reinterpret_cast<V*>(static_cast<unsigned char*>(memory) + offset);
  }
};

// Counts a block in. A round adds up to 2^31: its last block flips the top bit, and nothing has to be reset.
__device__ __forceinline__ unsigned arrive(unsigned* counter, int rank, int ranks, unsigned& added) {
  added = rank == 0 ? 0x80000000u - static_cast<unsigned>(ranks - 1) : 1u;
  return add_release(counter, added);
}

// Waits for all blocks of the team. What they wrote before, all threads see after.
__device__ __forceinline__ void meet(unsigned* counter, int rank, int ranks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned added;
    const unsigned before = arrive(counter, rank, ranks, added);
    while (((before ^ load_acquire(counter)) & 0x80000000u) == 0) spin_pause();
  }
  __syncthreads();
}

// Whether this is the last block of the team to come; to that one the others' writes are visible. Nobody waits.
__device__ __forceinline__ bool comes_last(unsigned* counter, int rank, int ranks, int* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned added;
    const unsigned before = arrive(counter, rank, ranks, added);
    *flag = ((before ^ (before + added)) & 0x80000000u) != 0;
  }
  __syncthreads();
  return *flag;
}

// Tells the sums of this block to the team.
__device__ __forceinline__ void publish(const Shape& s, double2* parts, int channels, int rank) {
  const double2* const totals = shared_at<double2>(s.layout.totals);
#pragma unroll 1
  for (int c = threadIdx.x; c < channels; c += kThreads) parts[static_cast<int64_t>(c) * s.ranks + rank] = totals[c];
}

// Adds the sums of all ranks: channels [first, channels) in steps of `step`.
template <typename Put>
__device__ __forceinline__ void sum_ranks(const Shape& s, const double2* parts, int channels, int first, int step,
                                          const Put& put) {
  const auto get = [&](int i, int rank) {
    return load_shared_by_blocks(&parts[static_cast<int64_t>(first + i * step) * s.ranks + rank]);
  };
  fold((channels - first + step - 1) / step, s.ranks, s.rank_bits, get, [&](int i, double2 sum, bool writes) {
    if (writes) put(first + i * step, sum);
  });
}

}  // namespace batchnorm_ext::cuda
