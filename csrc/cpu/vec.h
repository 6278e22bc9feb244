// The only file that knows the instruction set. A Block is kLanes elements, widened to the accumulation type and
// held in four vector registers: enough independent chains to hide the latency of a fused multiply-add.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <type_traits>

namespace batchnorm_ext::cpu {

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A>
using Vec = at::vec::Vectorized<A>;

constexpr int kVecs = 4;

template <typename A>
constexpr int64_t kLanes = kVecs* Vec<A>::size();

template <typename A>
struct Block {
  Vec<A> v[kVecs];

  void store(A* out) const {
    for (int q = 0; q < kVecs; ++q) v[q].store(out + q * Vec<A>::size());
  }
};

// Loads kLanes elements.
template <typename T>
inline Block<Acc<T>> load_block(const T* p) {
  using A = Acc<T>;
  Block<A> block;
  if constexpr (std::is_same_v<T, A>) {
    for (int q = 0; q < kVecs; ++q) block.v[q] = Vec<A>::loadu(p + q * Vec<A>::size());
  } else {
    for (int q = 0; q < kVecs; q += 2)
      std::tie(block.v[q], block.v[q + 1]) =
          at::vec::convert_to_float<T>(Vec<T>::loadu(p + q * Vec<A>::size()));
  }
  return block;
}

// Loads the first `count` < kLanes elements; the other lanes are zero.
template <typename T>
inline Block<Acc<T>> load_block(const T* p, int64_t count) {
  using A = Acc<T>;
  constexpr int64_t step = Vec<T>::size();
  Block<A> block;
  for (int q = 0; q < kVecs; q += step / Vec<A>::size(), p += step, count -= step) {
    const Vec<T> part = count > 0 ? Vec<T>::loadu(p, std::min(count, step)) : Vec<T>(T(0));
    if constexpr (std::is_same_v<T, A>)
      block.v[q] = part;
    else
      std::tie(block.v[q], block.v[q + 1]) = at::vec::convert_to_float<T>(part);
  }
  return block;
}

// Calls put(vector, index of its first element) for each vector of T that the block narrows to.
template <typename T, typename Put>
inline void each_stored_vector(const Block<Acc<T>>& block, const Put& put) {
  using A = Acc<T>;
  if constexpr (std::is_same_v<T, A>) {
    for (int q = 0; q < kVecs; ++q) put(block.v[q], q * Vec<A>::size());
  } else {
    for (int q = 0; q < kVecs; q += 2)
      put(at::vec::convert_from_float<T>(block.v[q], block.v[q + 1]), q * Vec<A>::size());
  }
}

// Writes past the caches, for an output that would only push its own input out of them. `p` is aligned to 64 bytes.
template <typename V>
inline void stream(const V& value, void* p) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<const __m512i&>(value));
#elif defined(CPU_CAPABILITY_AVX2)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<const __m256i&>(value));
#else
  value.store(p);
#endif
}

inline void stream_fence() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

template <bool kStream, typename T>
inline void store_block(T* p, const Block<Acc<T>>& block) {
  each_stored_vector<T>(block, [&](const Vec<T>& part, int64_t first) {
    if constexpr (kStream)
      stream(part, p + first);
    else
      part.store(p + first);
  });
}

// Stores the first `count` < kLanes elements.
template <typename T>
inline void store_block(T* p, const Block<Acc<T>>& block, int64_t count) {
  each_stored_vector<T>(block, [&](const Vec<T>& part, int64_t first) {
    if (count > first) part.store(p + first, std::min<int64_t>(count - first, Vec<T>::size()));
  });
}

// out[i] = f(i, in[i]...) for i in [0, n). `f` takes the index of a vector's first lane and one vector of each input.
template <bool kStream, typename T, typename F, typename... In>
inline void transform(T* out, int64_t n, const F& f, const In*... in) {
  using A = Acc<T>;
  constexpr int64_t L = kLanes<A>;
  const auto apply = [&](int64_t i, const auto&... x) {
    Block<A> y;
    for (int q = 0; q < kVecs; ++q) y.v[q] = f(i + q * Vec<A>::size(), x.v[q]...);
    return y;
  };
  int64_t i = 0;
  if constexpr (kStream) {
    const int64_t head = (-reinterpret_cast<intptr_t>(out) & 63) / sizeof(T);
    if (head > 0) {
      i = std::min(head, n);
      store_block(out, apply(0, load_block(in, i)...), i);
    }
  }
  for (; i + L <= n; i += L) store_block<kStream>(out + i, apply(i, load_block(in + i)...));
  if (i < n) store_block(out + i, apply(i, load_block(in + i, n - i)...), n - i);
}

}  // namespace batchnorm_ext::cpu
