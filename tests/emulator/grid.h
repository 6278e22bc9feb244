// A launch and its grid: blocks of warps of threads, and the barriers that they wait at.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <source_location>
#include <vector>

#include "fiber.h"
#include "vector_types.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulator {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

struct Launch {
  dim3 grid = {}, block = {};
  std::size_t shared_bytes = 0;
  bool cooperative = false;  // all blocks are resident at once; else a few are, how many is left to chance
  std::uint64_t seed = 0;
};

struct Thread;

// All `expected` threads have to arrive at the same place of the source before any goes on.
struct Barrier {
  const char* name = nullptr;
  unsigned expected = 0, arrived = 0, exited = 0;
  unsigned phase = 0;
  std::uint64_t edges[2] = {};  // their addresses carry the order of the even and the odd phases to ThreadSanitizer
  Thread* waiting = nullptr;
  std::source_location site;
};

struct Warp {
  Barrier barrier;
  std::uint64_t values[2][kWarpSize];  // of the even and the odd collectives: the next may begin while some still read
};

struct Block {
  uint3 index;
  Barrier barrier;
  void* shared = nullptr;
  std::vector<Warp> warps;
  std::unique_ptr<Thread[]> threads;
};

struct Thread {
  uint3 index;
  Fiber* fiber = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned lane = 0;
  unsigned collectives = 0;
  Thread* next_waiting = nullptr;
};

inline std::size_t count(const dim3& d) { return std::size_t{d.x} * d.y * d.z; }
inline uint3 position(std::size_t i, const dim3& d) {
  return {static_cast<unsigned>(i % d.x), static_cast<unsigned>(i / d.x % d.y), static_cast<unsigned>(i / d.x / d.y)};
}

}  // namespace emulator
