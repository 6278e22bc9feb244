// Ends the process, with a message, where a kernel or its launch is wrong.
#pragma once

#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <memory>
#include <source_location>
#include <vector>

#include "grid.h"

namespace emulator {

constexpr int kExitCode = 3;      // of a process whose kernel misuses barriers or collectives
constexpr int kMostReported = 8;  // barriers

[[gnu::format(printf, 1, 2), gnu::no_sanitize("thread")]] inline void print_error(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
}

[[noreturn]] inline void stop() {
  std::fflush(nullptr);
  _exit(kExitCode);  // the other threads stand in the middle of the kernel: nothing can be torn down in order
}

[[noreturn, gnu::format(printf, 2, 3), gnu::no_sanitize("thread")]] inline void fail(const std::source_location& site,
                                                                                     const char* format, ...) {
  print_error("%s:%u: error: ", site.file_name(), static_cast<unsigned>(site.line()));
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  print_error(" [block (%u, %u, %u), thread (%u, %u, %u)]\n", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x,
              threadIdx.y, threadIdx.z);
  stop();
}

inline void check_launch(const Launch& launch, bool from_kernel) {
  const dim3 &g = launch.grid, &b = launch.block;
  const char* problem = nullptr;
  if (from_kernel) problem = "a launch from a kernel";
  if (count(g) == 0 || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) problem = "a grid that CUDA does not launch";
  if (count(b) == 0 || count(b) > 1024 || b.z > 64) problem = "a block that CUDA does not launch";
  if (count(b) % kWarpSize) problem = "a block that does not consist of whole warps";
  if (launch.shared_bytes > (227 << 10)) problem = "more shared memory than 227 KB";
  if (!problem) return;
  print_error("emulator: error: %s: grid (%u, %u, %u), block (%u, %u, %u), shared memory of %zu bytes\n", problem, g.x,
              g.y, g.z, b.x, b.y, b.z, launch.shared_bytes);
  stop();
}

inline void report_waiting(const uint3& block, const Barrier& barrier, int& reported) {
  if (barrier.arrived == 0 || ++reported > kMostReported) return;
  print_error("%s:%u: note: %u of %u threads of block (%u, %u, %u) wait at %s\n", barrier.site.file_name(),
              static_cast<unsigned>(barrier.site.line()), barrier.arrived, barrier.expected, block.x, block.y, block.z,
              barrier.name);
}

// Where the threads of the resident blocks stand.
inline void report_waiting(const std::vector<std::unique_ptr<Block>>& resident) {
  int reported = 0;
  for (const auto& block : resident) {
    report_waiting(block->index, block->barrier, reported);
    for (const Warp& warp : block->warps) report_waiting(block->index, warp.barrier, reported);
  }
}

}  // namespace emulator
