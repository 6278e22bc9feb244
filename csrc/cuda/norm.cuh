// The one kernel. A block takes its chunk of a group of channels through these steps; a launch does all of them or, in
// two launches, the reduction and the map.
//
//   load the chunk, keep it in shared memory, sum it     reduce.cuh
//   sum over the team's blocks                           team.cuh
//   from sums to the coefficients of the map             finish() of forward.cuh, backward.cuh
//   map what was kept, store
#pragma once

#include "activated.cuh"
#include "plan.h"
#include "team.cuh"

namespace batchnorm_ext::cuda {

enum class Phase { kFused, kReduce, kMap };

// Steps that a thread has under way at once.
template <typename Op>
constexpr int kBatch = kLoads / Op::kInputs;

// A batch is kept whole or not at all: plans keep multiples of kLoads / kKept steps.
template <typename Op>
constexpr bool kKeepsBatches = kLoads / Op::kKept % kBatch<Op> == 0;

// What a thread takes in a step: a pack of each input.
template <typename Op, int kWidth_>
struct Packs {
  static constexpr int kWidth = kWidth_;
  Pack<typename Op::T, kWidth> in[Op::kInputs];
};

// Where this thread keeps what it takes in a step: packs, kThreads apart.
template <typename Op, int kWidth>
__device__ __forceinline__ auto* kept_at(const Shape& s, int step) {
  return shared_at<Pack<typename Op::T, kWidth>>(s.layout.kept) + step * (Op::kKept * kThreads) + threadIdx.x;
}

// kCount coefficients of the channels that this thread's packs touch, in registers, or in shared memory where they
// are too many for registers.
template <typename A, int kCount, typename Chunk, bool kHeld>
class Coefficients {
 public:
  __device__ __forceinline__ Coefficients(const A* table, int width, const Chunk& chunk) {
#pragma unroll
    for (int k = 0; k < kCount; ++k)
#pragma unroll
      for (int l = 0; l < Chunk::kLanes; ++l) held_[k][l] = table[k * width + chunk.channel(l)];
  }
  __device__ __forceinline__ A operator()(int k, int i) const { return held_[k][i % Chunk::kLanes]; }

 private:
  A held_[kCount > 0 ? kCount : 1][Chunk::kLanes];
};

template <typename A, int kCount, typename Chunk>
class Coefficients<A, kCount, Chunk, false> {
 public:
  __device__ __forceinline__ Coefficients(const A* table, int width, const Chunk& chunk)
      : table_(table), width_(width), chunk_(chunk) {}
  __device__ __forceinline__ A operator()(int k, int i) const {
    return table_[k * width_ + chunk_.channel(i % Chunk::kLanes)];
  }

 private:
  const A* table_;
  int width_;
  const Chunk& chunk_;
};

// Sums the chunk. The block keeps of it in shared memory, for the map, what it has room for.
template <bool kKeeps, typename Op, int kWidth, typename Chunk>
__device__ __forceinline__ auto reduce_chunk(const Shape& s, const Op& op, const Chunk& chunk) {
  using A = typename Op::A;
  typename Op::template Lanes<Chunk::kLanes> lanes{};
  const A* const table = shared_at<A>(s.layout.coefficients) + Op::kCoefficients * s.width;
  constexpr bool kHeld = Op::kKnown * Chunk::kLanes <= Op::kMostHeld;
  const Coefficients<A, Op::kKnown, Chunk, kHeld> known(table, s.width, chunk);
  static_assert(kKeepsBatches<Op>);
#pragma unroll 1
  for (int step = 0, batch = 1; step < chunk.steps; step += kBatch<Op>, ++batch) {
    Packs<Op, kWidth> packs[kBatch<Op>];
    const bool keeps = kKeeps && step < s.kept;
#pragma unroll
    for (int u = 0; u < kBatch<Op>; ++u)
      if (step + u < chunk.steps) {
        op.load(packs[u], chunk.offset(step + u), !keeps);
        if constexpr (Op::kSumsRest) op.load_rest(packs[u], chunk.offset(step + u));
      }
    const int left = chunk.steps - step, count = left < kBatch<Op> ? left : kBatch<Op>;
    if (step == 0) op.start(lanes, chunk, packs, count);
    if (keeps)
#pragma unroll
      for (int u = 0; u < kBatch<Op>; ++u)
        if (u < count)
#pragma unroll
          for (int i = 0; i < Op::kKept; ++i) kept_at<Op, kWidth>(s, step + u)[i * kThreads] = packs[u].in[i];
#pragma unroll
    for (int u = 0; u < kBatch<Op>; ++u)
      if (u < count) op.add(lanes, packs[u], known);
    // The centres follow the mean while they gain from it: after 2, 4, 8... batches.
    if (batch > 1 && (batch & (batch - 1)) == 0) lanes.recentre((step + count) * (kWidth / Chunk::kLanes));
  }
  return lanes;
}

// Maps the chunk, the last batch first: those that have to be loaded again, some of which the cache may still hold,
// come before those that are kept.
template <bool kKeeps, typename Op, int kWidth, typename Chunk>
__device__ __forceinline__ void map_chunk(const Shape& s, const Op& op, const Chunk& chunk) {
  using A = typename Op::A;
  if (chunk.steps == 0) return;
  constexpr int kCount = Op::kCoefficients + Op::kKnown;
  constexpr bool kHeld = kCount * Chunk::kLanes <= Op::kMostHeld;
  const Coefficients<A, kCount, Chunk, kHeld> c(shared_at<A>(s.layout.coefficients), s.width, chunk);
#pragma unroll 1
  for (int step = (chunk.steps - 1) / kBatch<Op> * kBatch<Op>; step >= 0; step -= kBatch<Op>) {
    Packs<Op, kWidth> packs[kBatch<Op>];
    const bool kept = kKeeps && step < s.kept;
#pragma unroll
    for (int u = 0; u < kBatch<Op>; ++u) {
      if (step + u >= chunk.steps) break;
      if (kept)
#pragma unroll
        for (int i = 0; i < Op::kKept; ++i) packs[u].in[i] = kept_at<Op, kWidth>(s, step + u)[i * kThreads];
      else
        op.load(packs[u], chunk.offset(step + u), false);
      op.load_rest(packs[u], chunk.offset(step + u));
    }
#pragma unroll
    for (int u = 0; u < kBatch<Op>; ++u)
      if (step + u < chunk.steps) op.template map<kKeeps>(packs[u], c, chunk.offset(step + u));
  }
}

// Leaves the sums over all of the group's elements in `totals`. False on the blocks that have no more to do.
template <Phase kPhase>
__device__ __forceinline__ bool sum_team(const Shape& s, const Workspace& ws, int channels, int team, int rank,
                                         int half) {
  double2* const totals = shared_at<double2>(s.layout.totals);
  double2* const parts = ws.parts + (static_cast<int64_t>(half) * s.teams + team) * s.width * s.ranks;
  double2* const shared_totals = ws.totals + static_cast<int64_t>(team) * s.width;
  unsigned* const counter = ws.counter(team);
  publish(s, parts, channels, rank);
  if constexpr (kPhase == Phase::kReduce) {
    if (!comes_last(counter, rank, s.ranks, shared_at<int>(s.layout.flag))) return false;
  } else {
    meet(counter, rank, s.ranks);
  }
  if (s.relay) {
    sum_ranks(s, parts, channels, rank, s.ranks, [&](int c, double2 sum) { shared_totals[c] = sum; });
    meet(counter, rank, s.ranks);
#pragma unroll 1
    for (int c = threadIdx.x; c < channels; c += kThreads) totals[c] = load_shared_by_blocks(&shared_totals[c]);
  } else {
    sum_ranks(s, parts, channels, 0, 1, [&](int c, double2 sum) { totals[c] = sum; });
  }
  __syncthreads();
  return true;
}

// Fills in the coefficients that are known before the sums.
template <typename Op, typename Chunk>
__device__ __forceinline__ void fill_known(const Shape& s, const Op& op, const Chunk& chunk) {
  auto* const table = shared_at<typename Op::A>(s.layout.coefficients) + Op::kCoefficients * s.width;
#pragma unroll 1
  for (int c = threadIdx.x; c < chunk.channels(); c += kThreads) {
    typename Op::A known[Op::kKnown];
    op.known_before(chunk.first + c, known);
#pragma unroll
    for (int i = 0; i < Op::kKnown; ++i) table[i * s.width + c] = known[i];
  }
}

template <Phase kPhase, typename Op, typename Chunk, int kWidth>
__device__ __forceinline__ void norm(const Shape& s, const Op& op, const Workspace& ws) {
  using A = typename Op::A;
  A* const table = shared_at<A>(s.layout.coefficients);
  double* const origins = shared_at<double>(s.layout.origins);
  const double2* const totals = shared_at<double2>(s.layout.totals);
  // A map after a reduction begins with what was read last, some of which the cache still holds.
  const bool backwards = kPhase == Phase::kMap;
  const int rank = backwards ? gridDim.y - 1 - blockIdx.y : blockIdx.y;
  const int team = backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const bool leads = kPhase == Phase::kReduce || rank == 0;  // of a reduction, only the block that leads goes on
  if (s.stagger > 0 && team % kBlocksPerSm > 0) pause(s.stagger * (team % kBlocksPerSm));
  int half = 0;
  for (int group = team; group < s.groups; group += s.teams, half ^= 1) {
    const Chunk chunk(s, group, rank);
    if constexpr (Op::kKnown > 0) {
      if constexpr (kPhase == Phase::kFused) {
        __syncthreads();  // those of the group before have been read
      }
      fill_known(s, op, chunk);
      if constexpr (kPhase != Phase::kMap) {
        __syncthreads();
      }
    }
    if constexpr (kPhase != Phase::kMap) {
      const int thread = threadIdx.x;
      A origin = 0;  // an element; loaded here, so that its latency is that of the chunk's first loads
      if (Op::kMoments && thread < chunk.channels()) origin = static_cast<A>(op.origin(chunk.first + thread));
      const auto lanes = reduce_chunk<kPhase == Phase::kFused, Op, kWidth>(s, op, chunk);
      if constexpr (Op::kMoments)
#pragma unroll 1
        for (int c = thread; c < chunk.channels(); c += kThreads)
          origins[c] = c == thread ? origin : op.origin(chunk.first + c);
      sum_block(s, op, chunk, lanes);
      if (s.ranks > 1 && !sum_team<kPhase>(s, ws, chunk.channels(), team, rank, half)) return;
    }
#pragma unroll 1
    for (int c = threadIdx.x; c < chunk.channels(); c += kThreads) {
      A map[Op::kCoefficients];
      if constexpr (kPhase == Phase::kMap)
        op.given(chunk.first + c, leads, map);
      else
        op.template finish<kPhase == Phase::kReduce>(chunk.first + c, totals[c], Op::kMoments ? origins[c] : 0, leads,
                                                     map);
      if constexpr (kPhase != Phase::kReduce)
#pragma unroll
        for (int i = 0; i < Op::kCoefficients; ++i) table[i * s.width + c] = map[i];
    }
    __syncthreads();
    if constexpr (kPhase != Phase::kReduce)
      if (op.maps()) map_chunk<kPhase == Phase::kFused, Op, kWidth>(s, op, chunk);
  }
  // All channels have been tracked before the batch is counted: the leaders draw tickets, and the last one does it.
  int64_t* const counter = op.counter();
  if (leads && counter != nullptr && threadIdx.x == 0 &&
      add_release(ws.ticket, 1) == static_cast<unsigned>(s.teams) - 1) {
    *ws.ticket = 0;
    ++*counter;
  }
}

template <Phase kPhase, typename Op, typename Chunk, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    norm_kernel(const __grid_constant__ Shape shape, const __grid_constant__ Op op,
                const __grid_constant__ Workspace workspace) {
  norm<kPhase, Op, Chunk, kWidth>(shape, op, workspace);
}

// Calls f with the kernel for a plan.
template <Phase kPhase, typename Op, typename F>
auto with_kernel(const Plan& plan, const F& f) {
  constexpr int kFull = 16 / sizeof(typename Op::T);
  if (plan.pattern == Pattern::kRow)
    return plan.pack == kFull ? f(norm_kernel<kPhase, Op, RowChunk<kFull>, kFull>)
                              : f(norm_kernel<kPhase, Op, RowChunk<1>, 1>);
  return plan.pack == kFull ? f(norm_kernel<kPhase, Op, ColumnChunk<kFull>, kFull>)
                            : f(norm_kernel<kPhase, Op, ColumnChunk<1>, 1>);
}

// The launches of a plan: launch.operator()<phase>(how, op) is called for each.
template <typename Op, typename F>
void run(const Plan& plan, const Op& op, double* between, const F& launch) {
  switch (plan.policy) {
    case Policy::kSplit:
      launch.template operator()<Phase::kReduce>(plan.first, op.reduction(between));
      launch.template operator()<Phase::kMap>(plan.second, op.mapping(between));
      break;
    case Policy::kReduce:
      launch.template operator()<Phase::kReduce>(plan.first, op.reduction(nullptr));
      break;
    case Policy::kMap:
      launch.template operator()<Phase::kMap>(plan.first, op);
      break;
    default:
      launch.template operator()<Phase::kFused>(plan.first, op);
  }
}

}  // namespace batchnorm_ext::cuda
