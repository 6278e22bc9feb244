// CUDA C++ for a host compiler: kernels are ordinary functions, and emulator::launch() runs their threads as fibers.
//
//   emulator::launch({.grid = 4, .block = 128, .shared_bytes = 1024, .seed = 7}, kernel, arguments...);
//
// What a kernel does wrong ends the process: misused barriers and collectives, deadlock and livelock with exit code 3
// and a message here; races under ThreadSanitizer, memory errors under AddressSanitizer and UBSan. Kernels keep to full
// masks, whole warps and dynamic shared memory. What is not emulated: the weak memory model, occupancy, speed.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "number_formats.h"
#include "scheduler.h"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace emulator {

template <typename T>
std::uint64_t to_bits(const T& value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T exchange(unsigned mask, const T& value, unsigned source, const std::source_location& site) {
  const std::uint64_t bits = scheduler.value_of(source, to_bits(value), mask, site);
  T result;
  std::memcpy(&result, &bits, sizeof(T));
  return result;
}

}  // namespace emulator

inline void __syncthreads(std::source_location site = std::source_location::current()) {
  emulator::scheduler.sync_block(site);
}

inline void __syncwarp(unsigned mask = emulator::kFullMask,
                       std::source_location site = std::source_location::current()) {
  emulator::scheduler.sync_warp(mask, site);
}

// A lane whose source lies outside its segment of `width` lanes gets its own value back.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = emulator::kWarpSize,
              std::source_location site = std::source_location::current()) {
  const unsigned lane = emulator::scheduler.lane(), w = static_cast<unsigned>(width);
  return emulator::exchange(mask, value, (lane & ~(w - 1)) | (static_cast<unsigned>(source) & (w - 1)), site);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = emulator::kWarpSize,
                  std::source_location site = std::source_location::current()) {
  const unsigned lane = emulator::scheduler.lane(), w = static_cast<unsigned>(width);
  const unsigned source = lane ^ static_cast<unsigned>(lane_mask);
  return emulator::exchange(mask, value, source < (lane & ~(w - 1)) + w ? source : lane, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location site = std::source_location::current()) {
  return emulator::scheduler.ballot(predicate != 0, mask, site);
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}

inline int __ffs(int bits) { return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned>(bits)) + 1; }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }

// glibc 2.42 has it.
#if !(defined(__GLIBC__) && __GLIBC_PREREQ(2, 42))
inline double rsqrt(double value) { return 1.0 / std::sqrt(value); }
#endif

namespace batchnorm_ext::cuda {

// This block's dynamic shared memory.
template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(emulator::scheduler.shared());
}

template <typename T>
T load_streaming(const T* p) {
  return *p;
}

template <typename T>
void store_streaming(T* p, T value) {
  *p = value;
}

// p += value; returns the old value. What the caller did before is visible to whoever acquires the new one.
inline unsigned add_release(unsigned* p, unsigned value) {
  emulator::scheduler.yield(true);
  return __atomic_fetch_add(p, value, __ATOMIC_ACQ_REL);
}

inline unsigned load_acquire(const unsigned* p) {
  emulator::scheduler.yield(false);
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

inline void spin_pause() { emulator::scheduler.yield(false); }
inline void pause(unsigned) {}

}  // namespace batchnorm_ext::cuda
