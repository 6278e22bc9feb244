// Kernels that are right and kernels that are wrong in one way each: `selftest CASE SEED` runs one of them.
// Exits with 0 where the emulator has nothing to say and the results are right, with 1 where they are wrong.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "emulator.h"
#include "expect.h"

namespace {

using batchnorm_ext::cuda::add_release;
using batchnorm_ext::cuda::dynamic_shared;
using batchnorm_ext::cuda::load_acquire;
using batchnorm_ext::cuda::load_streaming;
using batchnorm_ext::cuda::spin_pause;
using batchnorm_ext::cuda::store_streaming;
using emulator::kFullMask;
using emulator::launch;
using emulator::poison;

// Device memory: what a kernel forgets to write is NaN, what it writes beyond the end is an error.
template <typename T>
struct Buffer {
  explicit Buffer(std::size_t n) : values(std::make_unique_for_overwrite<T[]>(n)) {
    poison(values.get(), n * sizeof(T));
  }
  Buffer(std::size_t n, T value) : Buffer(n) {
    for (std::size_t i = 0; i < n; ++i) values[i] = value;
  }
  operator T*() { return values.get(); }
  std::unique_ptr<T[]> values;
};

unsigned flat_thread() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
unsigned threads() { return blockDim.x * blockDim.y * blockDim.z; }

__device__ __forceinline__ double warp_sum(double value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullMask, value, distance);
  return value;
}

// The guard is what keeps one round's reads from the next round's writes.
template <bool kGuarded>
__device__ double block_sum(double value) {
  double* partial = dynamic_shared<double>();
  const unsigned warps = threads() / 32;
  value = warp_sum(value);
  if (kGuarded) __syncthreads();
  if (flat_thread() % 32 == 0) partial[flat_thread() / 32] = value;
  __syncthreads();
  double sum = 0;
  for (unsigned w = 0; w < warps; ++w) sum += partial[w];
  return sum;
}

template <bool kGuarded>
__global__ void __launch_bounds__(1024) reduce(const float* in, double* out, unsigned per_block, int rounds) {
  const unsigned block = blockIdx.x + gridDim.x * blockIdx.y;
  for (int round = 0; round < rounds; ++round) {
    double mine[4] = {};  // on the fiber's stack, which blocks inherit from each other
    for (unsigned i = flat_thread(); i < per_block; i += threads())
      mine[i % 4] += load_streaming(in + block * per_block + i);
    const double sum = block_sum<kGuarded>(mine[0] + mine[1] + mine[2] + mine[3]);
    if (flat_thread() == 0) store_streaming(out + block, sum);
  }
}

template <bool kGuarded>
void block_reduction(std::uint64_t seed) {
  constexpr unsigned per_block = 500, blocks = 15;
  Buffer<float> in(blocks * per_block);
  for (unsigned i = 0; i < blocks * per_block; ++i) in[i] = static_cast<float>(i % 97);
  Buffer<double> out(blocks);
  launch({.grid = {5, 3}, .block = {16, 2, 3}, .shared_bytes = 3 * sizeof(double), .seed = seed}, reduce<kGuarded>,
         static_cast<const float*>(in), static_cast<double*>(out), per_block, 3);
  for (unsigned b = 0; b < blocks; ++b) {
    double expected = 0;
    for (unsigned i = 0; i < per_block; ++i) expected += in[b * per_block + i];
    expect(out[b] == expected);
  }
}

// Flips bit 31 of the counter when all blocks of the group have arrived, so it never has to be set back.
__device__ void group_barrier(unsigned* counter, unsigned rank, unsigned blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned old = add_release(counter, rank == 0 ? 0x80000000u - (blocks - 1) : 1u);
    while (((old ^ load_acquire(counter)) & 0x80000000u) == 0) spin_pause();
  }
  __syncthreads();
}

// In every round each block writes a value and reads those of all blocks of its group.
template <bool kBarrier>
__global__ void exchange_values(double* values, double* out, unsigned* counters, unsigned blocks, int rounds) {
  const unsigned rank = blockIdx.x % blocks, group = blockIdx.x / blocks;
  for (int round = 0; round < rounds; ++round) {
    double* row = values + ((round & 1) * (gridDim.x / blocks) + group) * blocks;
    if (threadIdx.x == 0) row[rank] = rank + 1.0;
    if (kBarrier) group_barrier(counters + group, rank, blocks);
    double sum = 0;
    for (unsigned b = 0; b < blocks; ++b) sum += row[b];
    out[(round * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x] = sum;
  }
}

void exchange_in_groups(std::uint64_t seed, bool barrier, bool cooperative) {
  constexpr unsigned blocks = 5, groups = 2, threads = 64;
  constexpr int rounds = 4;
  Buffer<unsigned> counters(groups, 0);
  for (int run = 0; run < 2; ++run) {
    Buffer<double> values(2 * groups * blocks), out(rounds * groups * blocks * threads);
    if (!barrier) {  // the race alone is wrong, the results are not
      for (unsigned i = 0; i < 2 * groups * blocks; ++i) values[i] = i % blocks + 1.0;
    }
    launch({.grid = groups * blocks, .block = threads, .cooperative = cooperative, .seed = seed + run},
           barrier ? exchange_values<true> : exchange_values<false>, static_cast<double*>(values),
           static_cast<double*>(out), static_cast<unsigned*>(counters), blocks, rounds);
    for (unsigned i = 0; i < rounds * groups * blocks * threads; ++i) expect(out[i] == blocks * (blocks + 1) / 2.0);
  }
}

void grid_barrier(std::uint64_t seed) { exchange_in_groups(seed, true, true); }
void missing_grid_barrier(std::uint64_t seed) { exchange_in_groups(seed, false, true); }
void grid_barrier_without_residency(std::uint64_t seed) { exchange_in_groups(seed, true, false); }

// Blocks that run one after the other are not ordered for all that.
void global_race(std::uint64_t seed) {
  Buffer<float> out(1);
  launch(
      {.grid = 2, .block = 32, .seed = seed},
      [](float* out) {
        if (threadIdx.x == 7) *out = 1;
      },
      static_cast<float*>(out));
  expect(*out == 1);
}

void launches_are_ordered(std::uint64_t seed) {
  Buffer<unsigned> values(256);
  const auto write = [](unsigned* values) { values[blockIdx.x * blockDim.x + threadIdx.x] = blockIdx.x; };
  const auto move = [](unsigned* values) {
    unsigned& other = values[255 - (blockIdx.x * blockDim.x + threadIdx.x)];
    other += 10;
  };
  launch({.grid = 4, .block = 64, .seed = seed}, write, static_cast<unsigned*>(values));
  launch({.grid = 4, .block = 64, .seed = seed}, move, static_cast<unsigned*>(values));
  for (unsigned i = 0; i < 256; ++i) expect(values[i] == i / 64 + 10);
}

// The last block to arrive sums up what the others left: ordered by the atomics alone.
__global__ void last_block_sums(double* partial, double* out, unsigned* arrived) {
  unsigned* is_last = dynamic_shared<unsigned>();
  partial[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0) *is_last = add_release(arrived, 1) == gridDim.x - 1;
  __syncthreads();
  if (!*is_last) return;
  double sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b * blockDim.x + (threadIdx.x + b) % blockDim.x];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) *out = sum;
}

void last_block(std::uint64_t seed) {
  Buffer<double> partial(9 * 32), out(1);
  Buffer<unsigned> arrived(1, 0);
  launch({.grid = 9, .block = 32, .shared_bytes = 4, .seed = seed}, last_block_sums, static_cast<double*>(partial),
         static_cast<double*>(out), static_cast<unsigned*>(arrived));
  expect(*out == 9 * 32);
}

template <bool kBarrier>
__global__ void neighbours_in_warp() {
  volatile unsigned* values = dynamic_shared<unsigned>();
  values[threadIdx.x] = 5;
  if (kBarrier) __syncwarp();
  values[threadIdx.x ^ 1] = 5;
}

void warp_barrier(std::uint64_t seed) {
  launch({.block = 64, .shared_bytes = 256, .seed = seed}, neighbours_in_warp<true>);
}
void missing_warp_barrier(std::uint64_t seed) {
  launch({.block = 64, .shared_bytes = 256, .seed = seed}, neighbours_in_warp<false>);
}
// A warp's barrier orders nothing between two warps.
void warp_barrier_for_block(std::uint64_t seed) {
  const auto kernel = [] {
    volatile unsigned* values = dynamic_shared<unsigned>();
    values[threadIdx.x] = 5;
    __syncwarp();
    values[threadIdx.x ^ 32] = 5;
  };
  launch({.block = 64, .shared_bytes = 256, .seed = seed}, kernel);
}

void shared_overrun(std::uint64_t seed) {
  const auto kernel = [] { dynamic_shared<float>()[threadIdx.x + 1] = 0; };
  launch({.block = 32, .shared_bytes = 32 * sizeof(float), .seed = seed}, kernel);
}

void global_overrun(std::uint64_t seed) {
  Buffer<float> out(63);
  const auto kernel = [](float* out) { out[blockIdx.x * blockDim.x + threadIdx.x] = 0; };
  launch({.grid = 2, .block = 32, .seed = seed}, kernel, static_cast<float*>(out));
}

void misaligned_vector(std::uint64_t seed) {
  Buffer<uint4> in(2, uint4{1, 2, 3, 4});
  const auto* shifted = reinterpret_cast<const uint4*>(reinterpret_cast<const unsigned*>(static_cast<uint4*>(in)) + 1);
  Buffer<unsigned> out(1);
  const auto kernel = [](const uint4* in, unsigned* out) {
    if (threadIdx.x == 0) *out = load_streaming(in).w;
  };
  launch({.block = 32, .seed = seed}, kernel, shifted, static_cast<unsigned*>(out));
}

void divergent_barrier(std::uint64_t seed) {
  const auto kernel = [] {
    if (threadIdx.x < 32)
      __syncthreads();
    else
      __syncthreads();
  };
  launch({.block = 64, .seed = seed}, kernel);
}

void early_exit(std::uint64_t seed) {
  const auto kernel = [] {
    if (threadIdx.x == 63) return;
    __syncthreads();
  };
  launch({.block = 64, .seed = seed}, kernel);
}

void partial_warp(std::uint64_t seed) {
  const auto kernel = [](int* out) {
    if (threadIdx.x >= 48) return;
    out[threadIdx.x] = __shfl_xor_sync(kFullMask, 1, 1);
  };
  Buffer<int> out(64);
  launch({.block = 64, .seed = seed}, kernel, static_cast<int*>(out));
}

void deadlock(std::uint64_t seed) {
  const auto kernel = [] {
    if (threadIdx.x < 16)
      __syncwarp();
    else
      __syncthreads();
  };
  launch({.block = 64, .seed = seed}, kernel);
}

void ragged_block(std::uint64_t seed) {
  launch({.block = 48, .seed = seed}, [] {});
}

void partial_mask(std::uint64_t seed) {
  launch({.block = 32, .seed = seed}, [] { __syncwarp(0xffff); });
}

void stack_overflow(std::uint64_t seed) {
  const auto kernel = [](std::size_t bytes) {
    volatile char* memory = static_cast<char*>(__builtin_alloca(bytes));
    for (std::size_t i = bytes; i > 512; i -= 512) memory[i] = 0;
  };
  launch({.block = 32, .seed = seed}, kernel, emulator::kStackBytes + 4096);
}

// Shared memory starts as NaN in every block, whatever an earlier one left there.
void poisoned_memory(std::uint64_t seed) {
  Buffer<unsigned> wrong(1, 0);
  const auto kernel = [](unsigned* wrong) {
    float* mine = dynamic_shared<float>() + threadIdx.x;
    if (!std::isnan(*mine)) add_release(wrong, 1);
    *mine = 1;
  };
  launch({.grid = 20, .block = 32, .shared_bytes = 128, .seed = seed}, kernel, static_cast<unsigned*>(wrong));
  expect(*wrong == 0);
  Buffer<double> output(3);
  for (int i = 0; i < 3; ++i) expect(std::isnan(output[i]));
}

// Prints the order in which the threads of a grid take tickets.
void tickets(std::uint64_t seed) {
  constexpr unsigned threads = 2 * 64;
  Buffer<unsigned> next(1, 0), order(threads);
  const auto kernel = [](unsigned* next, unsigned* order) {
    order[add_release(next, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
  };
  launch({.grid = 2, .block = 64, .cooperative = true, .seed = seed}, kernel, static_cast<unsigned*>(next),
         static_cast<unsigned*>(order));
  for (unsigned i = 0; i < threads; ++i) std::printf("%u ", order[i]);
}

// Prints the order in which the blocks of a normal launch end.
void block_order(std::uint64_t seed) {
  constexpr unsigned blocks = 32;
  Buffer<unsigned> next(1, 0), order(blocks);
  const auto kernel = [](unsigned* next, unsigned* order) {
    __syncthreads();
    if (threadIdx.x == 0) order[add_release(next, 1)] = blockIdx.x;
  };
  launch({.grid = blocks, .block = 32, .seed = seed}, kernel, static_cast<unsigned*>(next),
         static_cast<unsigned*>(order));
  for (unsigned i = 0; i < blocks; ++i) std::printf("%u ", order[i]);
}

__global__ void call_collectives(unsigned* wrong) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto holds = [&](bool right) {
    if (!right) add_release(wrong, 1);
  };
  holds(__shfl_sync(kFullMask, lane * 1.5, 5) == 7.5);
  holds(__shfl_sync(kFullMask, lane, lane + 33) == (lane + 1) % 32);
  holds(__shfl_sync(kFullMask, lane, 3, 8) == (lane & ~7) + 3);
  holds(__shfl_xor_sync(kFullMask, static_cast<short>(lane), 16) == (lane ^ 16));
  holds(__shfl_xor_sync(kFullMask, lane, 8, 8) == (lane < 8 ? lane : (lane ^ 8) < lane ? (lane ^ 8) : lane));
  const uint2 pair = __shfl_sync(kFullMask, uint2{threadIdx.x % 32, 7}, 9);
  holds(pair.x == 9 && pair.y == 7);
  holds(__ballot_sync(kFullMask, lane % 3 == 0) == 0x49249249u);
}

void collectives(std::uint64_t seed) {
  Buffer<unsigned> wrong(1, 0);
  launch({.grid = 2, .block = 96, .seed = seed}, call_collectives, static_cast<unsigned*>(wrong));
  expect(*wrong == 0);
}

struct Case {
  const char* name;
  void (*run)(std::uint64_t seed);
};

constexpr Case kCases[] = {
    {"block_reduction", block_reduction<true>},
    {"missing_barrier", block_reduction<false>},
    {"grid_barrier", grid_barrier},
    {"missing_grid_barrier", missing_grid_barrier},
    {"grid_barrier_without_residency", grid_barrier_without_residency},
    {"global_race", global_race},
    {"launches_are_ordered", launches_are_ordered},
    {"last_block", last_block},
    {"warp_barrier", warp_barrier},
    {"missing_warp_barrier", missing_warp_barrier},
    {"warp_barrier_for_block", warp_barrier_for_block},
    {"shared_overrun", shared_overrun},
    {"global_overrun", global_overrun},
    {"misaligned_vector", misaligned_vector},
    {"divergent_barrier", divergent_barrier},
    {"early_exit", early_exit},
    {"partial_warp", partial_warp},
    {"deadlock", deadlock},
    {"ragged_block", ragged_block},
    {"partial_mask", partial_mask},
    {"stack_overflow", stack_overflow},
    {"poisoned_memory", poisoned_memory},
    {"tickets", tickets},
    {"block_order", block_order},
    {"collectives", collectives},
};

}  // namespace

int main(int argc, char** argv) {
  for (const Case& c : kCases) {
    if (argc != 3 || std::strcmp(argv[1], c.name) != 0) continue;
    c.run(std::strtoull(argv[2], nullptr, 10));
    return 0;
  }
  std::fprintf(stderr, "usage: selftest CASE SEED\n");
  return 2;
}
