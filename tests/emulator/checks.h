// What the test of the kernels is made of: buffers whose every unwritten byte is NaN, and comparisons with bounds.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "cuda/pack.cuh"

namespace batchnorm_ext::cuda {

// What the kernels are compared with: 11 bits more than a double at least.
using Exact = long double;

// Half the distance between 1 and the next number.
template <typename T>
constexpr Exact kRounding = sizeof(T) == 8              ? 0x1p-53L
                            : sizeof(T) == 4            ? 0x1p-24L
                            : std::is_same_v<T, __half> ? 0x1p-11L
                                                        : 0x1p-8L;

// Of exactly so many elements, poisoned, and off the alignment of packs where asked.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count, bool aligned = true)
      : count_(count), memory_(allocate(count + !aligned), std::free), begin_(memory_.get() + !aligned) {
    clear();
  }
  void clear() const { emulator::poison(begin_, count_ * sizeof(T)); }
  T* data() const { return begin_; }
  T& operator[](int64_t i) const { return begin_[i]; }
  int64_t size() const { return count_; }
  void append_to(std::vector<unsigned char>& bytes) const {
    const auto* const from = reinterpret_cast<const unsigned char*>(begin_);
    bytes.insert(bytes.end(), from, from + count_ * sizeof(T));
  }

 private:
  // Not a byte more than asked for, so that AddressSanitizer sees what lies behind.
  static T* allocate(int64_t count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, count * sizeof(T))) std::abort();
    return static_cast<T*>(memory);
  }

  int64_t count_;
  std::unique_ptr<T, void (*)(void*)> memory_;
  T* begin_;
};

// One value per channel, of fp32 or of the input's type, with gaps between them.
template <typename T>
class PerChannel {
 public:
  PerChannel(int64_t count, bool is_float)
      : is_float_(is_float), floats_(is_float ? count * kStride : 0), own_(is_float ? 0 : count * kStride) {}

  Channels<T> view() const {
    return {is_float_ ? static_cast<void*>(floats_.data()) : static_cast<void*>(own_.data()), kStride, is_float_};
  }
  Exact get(int64_t c) const { return is_float_ ? floats_[c * kStride] : widen(own_[c * kStride]); }
  void set(int64_t c, double value) const {
    if (is_float_)
      floats_[c * kStride] = static_cast<float>(value);
    else
      own_[c * kStride] = narrow<T>(static_cast<Acc<T>>(value));
  }
  void clear() const { floats_.clear(), own_.clear(); }
  void append_to(std::vector<unsigned char>& bytes) const { floats_.append_to(bytes), own_.append_to(bytes); }
  bool is_float() const { return is_float_; }

 private:
  static constexpr int64_t kStride = 2;
  bool is_float_;
  Buffer<float> floats_;
  Buffer<T> own_;
};

inline bool failed = false;

inline void check(const char* name, int64_t at, Exact actual, Exact expected, Exact bound) {
  if (actual == expected || (std::isnan(actual) && std::isnan(expected)) || std::fabs(actual - expected) <= bound)
    return;
  if (!failed)
    std::fprintf(stderr, "%s[%ld]: got %.9Lg for %.9Lg, off by %.3Lg, allowed %.3Lg\n", name, static_cast<long>(at),
                 actual, expected, std::fabs(actual - expected), bound);
  failed = true;
}

// Of what has been rounded to S, where the bound is that before.
template <typename S>
void check_rounded(const char* name, int64_t at, Exact actual, Exact expected, Exact bound) {
  constexpr bool half = std::is_same_v<S, __half>;
  // From where on infinity is as near.
  constexpr Exact least_infinite = half ? 65520 : (2 - kRounding<S>)*(sizeof(S) == 8 ? 0x1p1023L : 0x1p127L);
  // Half the distance between subnormal numbers, or all of it where the bound may be of fp64.
  constexpr Exact subnormal = half ? 0x1p-25L : sizeof(S) == 8 ? 0x1p-1074L : sizeof(S) == 4 ? 0x1p-150L : 0x1p-134L;
  if (std::fabs(expected) >= least_infinite)
    check(name, at, actual, std::copysign(std::numeric_limits<Exact>::infinity(), expected), 0);
  else
    check(name, at, actual, expected, bound + kRounding<S> * std::fabs(expected) + subnormal);
}

// The same of a value per channel.
template <typename T>
void check_channel(const char* name, int64_t c, const PerChannel<T>& actual, Exact expected, Exact bound) {
  if (actual.is_float())
    check_rounded<float>(name, c, actual.get(c), expected, bound);
  else
    check_rounded<T>(name, c, actual.get(c), expected, bound);
}

}  // namespace batchnorm_ext::cuda
