// Large fresh outputs. The kernel hands out zeroed 4 KB pages one fault at a time, which costs several times the
// normalization itself; huge pages make it a few faults. Only advice, given before the memory is first touched.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <ATen/Parallel.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace batchnorm_ext::cpu {

inline at::Tensor empty_output_like(const at::Tensor& x) {
  at::Tensor out = at::empty_like(x);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096, worthwhile = uintptr_t{4} << 20;
  if (out.nbytes() >= worthwhile && !getenv("NOHP")) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
    const uintptr_t first = (begin + page - 1) & ~(page - 1), last = (begin + out.nbytes()) & ~(page - 1);
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
    if(!getenv("NOTOUCH")) {
    // One thread a page: threads that fault on the same page at once all zero it, and all but one throw it away.
    constexpr uintptr_t huge = uintptr_t{2} << 20;
    const uintptr_t first_huge = (first + huge - 1) & ~(huge - 1);
    at::parallel_for(0, static_cast<int64_t>((last - first_huge) / huge), 1, [&](int64_t from, int64_t to) {
      for (int64_t page = from; page < to; ++page) *reinterpret_cast<volatile char*>(first_huge + page * huge) = 0;
    });
    }
  }
#endif
  return out;
}

}  // namespace batchnorm_ext::cpu
