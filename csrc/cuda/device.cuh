// What the kernels need of CUDA beyond the language, and the only file that knows whether they are compiled for a GPU
// or, to be tested, for threads that a host program schedules.
#pragma once

#if defined(BATCHNORM_EXT_EMULATOR)

#include "emulator.h"

namespace batchnorm_ext::cuda {

template <typename T>
unsigned narrow_pair(float low, float high) {
  if constexpr (std::is_same_v<T, __half>)
    return __half_as_ushort(__float2half_rn(low)) | __half_as_ushort(__float2half_rn(high)) << 16;
  else
    return __bfloat16_as_ushort(__float2bfloat16_rn(low)) | __bfloat16_as_ushort(__float2bfloat16_rn(high)) << 16;
}

using std::fma, std::fmaf, std::isfinite, std::sqrt;

template <typename T>
T load_shared_by_blocks(const T* p) {
  return *p;
}

}  // namespace batchnorm_ext::cuda

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cuda/atomic>
#include <type_traits>

namespace batchnorm_ext::cuda {

// The dynamic shared memory of the block.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

// The type of the one load or store that moves a T.
template <typename T>
using Transfer = std::conditional_t<
    sizeof(T) == 16, uint4,
    std::conditional_t<sizeof(T) == 8, uint2, std::conditional_t<sizeof(T) == 4, unsigned, unsigned short> > >;

// A load of what nobody will read again soon.
template <typename T>
__device__ __forceinline__ T load_streaming(const T* p) {
  static_assert(sizeof(T) == sizeof(Transfer<T>) && alignof(T) == sizeof(T));
  const Transfer<T> raw = __ldcs(reinterpret_cast<const Transfer<T>*>(p));
  return reinterpret_cast<const T&>(raw);
}

template <typename T>
__device__ __forceinline__ void store_streaming(T* p, T value) {
  __stcs(reinterpret_cast<Transfer<T>*>(p), reinterpret_cast<const Transfer<T>&>(value));
}

// A load past the cache of the multiprocessor, of what another block wrote.
template <typename T>
__device__ __forceinline__ T load_shared_by_blocks(const T* p) {
  return __ldcg(p);
}

// Two numbers in a word.
template <typename T>
__device__ __forceinline__ unsigned narrow_pair(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const unsigned&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const unsigned&>(pair);
  }
}

using DeviceAtomic = ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device>;

// Adds; what the block wrote before is seen by whoever acquires the sum. Returns the value before.
__device__ __forceinline__ unsigned add_release(unsigned* p, unsigned value) {
  return DeviceAtomic(*p).fetch_add(value, ::cuda::memory_order_acq_rel);
}

__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
  return DeviceAtomic(*const_cast<unsigned*>(p)).load(::cuda::memory_order_acquire);
}

__device__ __forceinline__ void spin_pause() { __nanosleep(20); }

__device__ __forceinline__ void pause(unsigned nanoseconds) { __nanosleep(nanoseconds); }

}  // namespace batchnorm_ext::cuda

#endif
