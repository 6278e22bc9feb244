// What the kernels are told of a tensor: how it is cut up. Lengths are in packs where they say so, else in elements.
//
// A pack is what one load or store moves. Channels are taken in groups; `ranks` blocks share a group, each a chunk of
// it. `teams` groups are worked on at the same time, each by a team of `ranks` blocks that walks over its groups.
#pragma once

#include <cstdint>

#include "../geometry.h"

namespace batchnorm_ext::cuda {

#if defined(BATCHNORM_EXT_CUDA_THREADS)
constexpr int kThreads = BATCHNORM_EXT_CUDA_THREADS;
#else
constexpr int kThreads = 256;  // of a block
#endif
constexpr int kBlocksPerSm = 3;  // one loads while the other waits, reduces or stores
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLoads = 4;               // packs that a thread loads at once: 64 bytes, which hide the latency of memory
constexpr int kPassLanes = 4;           // lanes of a pack that a column reduction sums at a time
constexpr int kCentreRows = 16;         // of threads in a column whose centres are averaged
constexpr int64_t kCounterBytes = 128;  // a cache line for each counter that blocks wait on
constexpr int64_t kMostRanks = 65535;   // the second dimension of a CUDA grid
constexpr int64_t kMostElements = int64_t{1} << 30;  // of a chunk, and of a run: their sum is divided in 31 bits

// Exact quotients of numbers below 2^31 by multiplication (Granlund & Montgomery 1994, "Division by invariant integers
// using multiplication", figure 4.1).
struct Divider {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  Divider() = default;
  explicit Divider(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    while ((int64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d) / d + 1);
  }
};

// The statistic and the channel of a cell, of which there are at most 2^30: a quotient of 64 bits would take dozens of
// instructions, and registers.
BATCHNORM_EXT_HD int64_t stat_of(const Geometry& g, int64_t cell) {
  return g.per_stat == 1 ? cell : static_cast<uint32_t>(cell) / static_cast<uint32_t>(g.per_stat);
}
BATCHNORM_EXT_HD int64_t stats_of(const Geometry& g) { return stat_of(g, g.cells()); }  // how many there are
BATCHNORM_EXT_HD int64_t channel_of(const Geometry& g, int64_t cell) {
  return g.batch == 1 ? cell : static_cast<uint32_t>(cell) % static_cast<uint32_t>(g.channels);
}

// Where a block has its arrays in shared memory, in bytes. Pairs are of the accumulation type.
struct Layout {
  int32_t totals;        // double2 [width]: sums of the group
  int32_t origins;       // double [width]: what they are about
  int32_t coefficients;  // [coefficients, width]: of the map
  int32_t sums;          // column: pairs [threads, pass]
  int32_t parts;         // column: pairs [max(threads, columns * pass)]
  int32_t entries;       // pairs; row: [warps], column: [columns * pack]
  int32_t centre;        // of each of them
  int32_t flag;          // int
  int32_t kept;          // packs [kept, inputs, threads]: what the block keeps of the tensor
};

struct Shape {
  Geometry geometry;
  int64_t stride;  // from one index of `outer` to the next
  int64_t chunk;   // of a rank: packs of the whole group (row) or rows of the tensor (column)
  int32_t groups, groups_per_sample;
  int32_t width;  // channels of a group; the last one may have fewer
  int32_t ranks, teams;
  int32_t kept;          // steps of its chunk that a block keeps in shared memory: all, or whole batches of loads
  int32_t entry_bits;    // 2^bits threads add up the sums of one channel over a block,
  int32_t rank_bits;     // and over the ranks
  bool relay;            // each rank adds up some channels over the ranks for all, instead of all for itself
  int32_t stagger;       // nanoseconds by which teams start apart, so that some move data while others meet
  Divider run;           // row: packs of a run of one channel
  Divider inner;         // column: elements of one channel in a row of the tensor
  Divider columns;       // column: packs of the group in a row of the tensor
  Divider rows_at_once;  // column: rows that a block takes in one step
  Divider outputs;       // column: sums that a pass of the reduction gives
  int32_t splits;        // column: threads that share one of them
  Layout layout;
};

}  // namespace batchnorm_ext::cuda
