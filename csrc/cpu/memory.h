// Large fresh outputs. The kernel hands out zeroed 4 KB pages one fault at a time, which costs several times the
// normalization itself; huge pages make it a few faults. Only advice, given before the memory is first touched.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace batchnorm_ext::cpu {

inline at::Tensor empty_output_like(const at::Tensor& x) {
  at::Tensor out = at::empty_like(x);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096, worthwhile = uintptr_t{4} << 20;
  if (out.nbytes() >= worthwhile) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
    const uintptr_t first = (begin + page - 1) & ~(page - 1), last = (begin + out.nbytes()) & ~(page - 1);
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return out;
}

}  // namespace batchnorm_ext::cpu
