// Buffers in which every unwritten byte is NaN and no byte is more than asked for, and comparisons with bounds.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>

namespace batchnorm_ext::cpu {

// What the kernels are compared with: 11 bits more than a double at least.
using Exact = long double;

// Half the distance between 1 and the next number.
template <typename T>
constexpr Exact kRounding = sizeof(T) == 8                 ? 0x1p-53L
                            : sizeof(T) == 4               ? 0x1p-24L
                            : std::is_same_v<T, c10::Half> ? 0x1p-11L
                                                           : 0x1p-8L;

// `count` elements, the first of them `offset` elements away from an alignment that suits all.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count, int64_t offset = 0)
      : count_(count), memory_(allocate(offset + count), std::free), begin_(memory_.get() + offset) {
    std::memset(static_cast<void*>(begin_), 0xff, bytes());
  }
  T* data() const { return begin_; }
  T& operator[](int64_t i) const { return begin_[i]; }
  int64_t size() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }

 private:
  static T* allocate(int64_t count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, count * sizeof(T))) std::abort();
    return static_cast<T*>(memory);
  }

  int64_t count_;
  std::unique_ptr<T, void (*)(void*)> memory_;
  T* begin_;
};

// The first error ends the program.
class Checks {
 public:
  explicit Checks(std::string configuration) : configuration_(std::move(configuration)) {}

  void within(const char* name, int64_t at, Exact actual, Exact expected, Exact bound) const {
    if (actual == expected || std::fabs(actual - expected) <= bound) return;
    fail();
    std::fprintf(stderr, "%s[%ld] is %.9Lg, expected %.9Lg, off by %.3Lg, allowed %.3Lg\n", name, static_cast<long>(at),
                 actual, expected, std::fabs(actual - expected), bound);
    std::exit(1);
  }

  // Of what has been rounded to T, where the bound is that before.
  template <typename T>
  void rounded(const char* name, int64_t at, Exact actual, Exact expected, Exact bound) const {
    // half the distance of subnormal numbers; bfloat16's, where float's is finer
    constexpr Exact subnormal = std::is_same_v<T, c10::Half> ? 0x1p-25L : 0x1p-134L;
    within(name, at, actual, expected, bound + kRounding<T> * std::fabs(expected) + subnormal);
  }

  template <typename T>
  void same(const char* name, const Buffer<T>& actual, const Buffer<T>& expected) const {
    if (std::memcmp(actual.data(), expected.data(), expected.bytes()) == 0) return;
    fail();
    for (int64_t i = 0; i < expected.size(); ++i) {
      if (std::memcmp(&actual[i], &expected[i], sizeof(T)) == 0) continue;
      std::fprintf(stderr, "%s[%ld] is %.17g, and was %.17g before\n", name, static_cast<long>(i),
                   static_cast<double>(actual[i]), static_cast<double>(expected[i]));
      std::exit(1);
    }
  }

 private:
  void fail() const { std::fprintf(stderr, "%s: ", configuration_.c_str()); }

  std::string configuration_;
};

}  // namespace batchnorm_ext::cpu
