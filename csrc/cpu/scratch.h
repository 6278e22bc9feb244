// Heap memory for the accumulators of one task, which do not fit a small thread stack (128 KB with musl, or what
// OMP_STACKSIZE sets). The compiler rejects stack frames over 16 KB (setup.py).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <tuple>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace batchnorm_ext::cpu {

// Keeps the memory of the largest request so far, usually the first one: every chunk then works in the same cache
// lines.
class Scratch {
 public:
  // Uninitialized arrays of so many elements, on cache lines of their own. They last until the next call.
  template <typename... U>
  std::tuple<U*...> arrays(const std::array<int64_t, sizeof...(U)>& counts) {
    return arrays<U...>(counts, std::index_sequence_for<U...>());
  }

 private:
  static constexpr int64_t kLine = 64;

  template <typename... U, size_t... I>
  std::tuple<U*...> arrays(const std::array<int64_t, sizeof...(U)>& counts, std::index_sequence<I...>) {
    static_assert(((alignof(U) <= kLine) && ...));
    const std::array<int64_t, sizeof...(U)> bytes = {counts[I] * static_cast<int64_t>(sizeof(U))...};
    std::array<int64_t, sizeof...(U) + 1> begin = {};
    for (size_t i = 0; i < bytes.size(); ++i) begin[i + 1] = begin[i] + (bytes[i] + kLine - 1) / kLine * kLine + kGap;
    reserve(begin.back());
    for (size_t i = 0; i < bytes.size(); ++i) poison(begin[i] + bytes[i], begin[i + 1]);
    return {reinterpret_cast<U*>(first_ + begin[I])...};
  }

  void reserve(int64_t bytes) {
    if (bytes > bytes_) {
      // Aligned by hand: aligned allocation passes by the fast paths of malloc.
      memory_.reset(new std::byte[bytes + kLine]);
      first_ = memory_.get() + (-reinterpret_cast<uintptr_t>(memory_.get()) & (kLine - 1));
      bytes_ = bytes;
    }
    unpoison();
  }

// So that AddressSanitizer reports what runs over the end of an array.
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kGap = kLine;
  void unpoison() const { __asan_unpoison_memory_region(first_, bytes_); }
  void poison(int64_t from, int64_t to) const { __asan_poison_memory_region(first_ + from, to - from); }
#else
  static constexpr int64_t kGap = 0;
  void unpoison() const {}
  void poison(int64_t, int64_t) const {}
#endif

  std::unique_ptr<std::byte[]> memory_;
  std::byte* first_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace batchnorm_ext::cpu
