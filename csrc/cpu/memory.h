// Large outputs: from which size on they are streamed, and how their memory is come by. The kernel hands out zeroed
// 4 KB pages one fault at a time, which costs several times the normalization itself; huge pages make it a few faults.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace batchnorm_ext::cpu {

// Outputs from this size on are written past the caches, where they would only push their own input out. Smaller ones
// stay for whoever reads them next. Half of a last-level cache that others share too, within reason.
inline int64_t stream_bytes() {
  static const int64_t bytes = [] {
    int64_t cache = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return std::clamp<int64_t>(cache / 2, int64_t{8} << 20, int64_t{32} << 20);
  }();
  return bytes;
}

inline at::Tensor empty_output_like(const at::Tensor& x) {
  at::Tensor out = at::empty_like(x);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096, huge = uintptr_t{2} << 20;
  if (out.nbytes() < 2 * huge) return out;
  const auto up = [](uintptr_t address, uintptr_t unit) { return (address + unit - 1) / unit * unit; };
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out.mutable_data_ptr()), end = begin + out.nbytes();
  madvise(reinterpret_cast<void*>(up(begin, page)), end / page * page - up(begin, page), MADV_HUGEPAGE);
  // One thread a page: threads that fault on the same page at once all zero it, and all but one throw it away.
  const uintptr_t first = up(begin, huge);
  at::parallel_for(0, static_cast<int64_t>((end - first) / huge), 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) *reinterpret_cast<volatile char*>(first + i * huge) = 0;
  });
#endif
  return out;
}

}  // namespace batchnorm_ext::cpu
