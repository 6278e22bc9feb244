// The only file that knows the instruction set. Elements are read, computed on and written in blocks of whole vectors,
// widened to the accumulation type.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace batchnorm_ext::cpu {

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A>
using Vec = at::vec::Vectorized<A>;

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
constexpr bool kHasAvx = true;
#else
constexpr bool kHasAvx = false;
#endif

// Vectors of a full block: enough independent chains to hide the latency of a fused multiply-add.
constexpr int kVecs = 4;

template <typename A>
constexpr int64_t kLanes = kVecs * Vec<A>::size();

// Vectors that one vector of T widens to: the smallest block.
template <typename T>
constexpr int kParts = Vec<T>::size() / Vec<Acc<T>>::size();

template <typename A, int V = kVecs>
struct Block {
  Vec<A> v[V];
};

// f(0), f(1)..., n of them. Not a loop: of an array that one goes through, GCC 12 leaves copies on the stack, even
// where it unrolls the loop.
template <int n, typename F>
__attribute__((always_inline)) inline void unrolled(const F& f) {
  [&]<int... q>(std::integer_sequence<int, q...>)
      __attribute__((always_inline)) { (f(q), ...); }(std::make_integer_sequence<int, n>());
}

// The block of f(0), f(1)...
template <typename A, int V, typename F>
__attribute__((always_inline)) inline Block<A, V> make_block(const F& f) {
  return [&]<int... q>(std::integer_sequence<int, q...>)
             __attribute__((always_inline)) { return Block<A, V>{{f(q)...}}; }(std::make_integer_sequence<int, V>());
}

// One value for each lane of a full block, in memory and not initialized.
template <typename A>
struct LaneArray {
  alignas(64) A values[kLanes<A>];

  Vec<A> operator[](int q) const { return Vec<A>::loadu(values + q * Vec<A>::size()); }
  void set(int q, const Vec<A>& v) { v.store(values + q * Vec<A>::size()); }
};

// Widens V vectors. `from(first)` gives one vector of T.
template <typename T, int V, typename From>
__attribute__((always_inline)) inline Block<Acc<T>, V> widen(const From& from) {
  return make_block<Acc<T>, V>([&](int q) __attribute__((always_inline)) {
    const Vec<T> part = from(q / kParts<T> * Vec<T>::size());
    if constexpr (kParts<T> == 1) {
      return part;
    } else {
      const auto [low, high] = at::vec::convert_to_float<T>(part);
      return q % 2 == 0 ? low : high;
    }
  });
}

// Which lane has which element of a block. Where all lanes are summed, any will do: bfloat16 then takes half the
// instructions to widen, as the upper and the lower half of each 32 bits.
enum class Order { kOfMemory, kAny };

template <int V, Order order = Order::kOfMemory, typename T>
__attribute__((always_inline)) inline Block<Acc<T>, V> load_block(const T* p) {
  if constexpr (order == Order::kAny && std::is_same_v<T, c10::BFloat16>)
    return make_block<float, V>([&](int q) __attribute__((always_inline)) {
      using Bits = at::vec::Vectorized<int32_t>;
      const Bits pairs = Bits::loadu(p + q / 2 * Vec<T>::size());
      return at::vec::cast<float>(q % 2 == 0 ? pairs << Bits(16) : pairs & Bits(static_cast<int32_t>(0xffff0000)));
    });
  else
    return widen<T, V>([&](int64_t first) __attribute__((always_inline)) { return Vec<T>::loadu(p + first); });
}

// Loads the first `count` elements; the other lanes are zero.
template <int V, typename T>
__attribute__((always_inline)) inline Block<Acc<T>, V> load_block(const T* p, int64_t count) {
  const auto part = [&](int64_t first) __attribute__((always_inline)) {
    const int64_t left = std::clamp<int64_t>(count - first, 0, Vec<T>::size());
    return left > 0 ? Vec<T>::loadu(p + first, left) : Vec<T>(T(0));
  };
  if constexpr (kParts<T> == 1) {
    return widen<T, V>(part);
  } else {  // loaded once for both halves: of partial loads the compiler may not see that they are the same
    static_assert(V == kParts<T>);
    const auto [low, high] = at::vec::convert_to_float<T>(part(0));
    return {{low, high}};
  }
}

// Two vectors as one of a narrower type. The instruction for it takes subnormal numbers for zero, as those of matrix
// multiplication on the same processors do.
template <typename T>
inline Vec<T> narrow_pair(const Vec<float>& low, const Vec<float>& high) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, c10::BFloat16>)
    return Vec<T>(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
#endif
  return at::vec::convert_from_float<T>(low, high);
}

// Narrows a block and calls put(vector of T, index of its first element) for each vector of it.
template <typename T, int V, typename Put>
__attribute__((always_inline)) inline void narrow(const Block<Acc<T>, V>& block, const Put& put) {
  unrolled<V / kParts<T>>([&](int i) __attribute__((always_inline)) {
    if constexpr (kParts<T> == 1)
      put(block.v[i], i * Vec<T>::size());
    else
      put(narrow_pair<T>(block.v[2 * i], block.v[2 * i + 1]), i * Vec<T>::size());
  });
}

// The lower and the upper half of the lanes in fp64, in registers as below.
inline std::pair<Vec<double>, Vec<double>> widen_lanes(const Vec<float>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 all = v;
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(all)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(all, 1))};
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 all = v;
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(all)), _mm256_cvtps_pd(_mm256_extractf128_ps(all, 1))};
#else
  alignas(64) float lanes[Vec<float>::size()];
  alignas(64) double wide[Vec<float>::size()];
  v.store(lanes);
  std::copy_n(lanes, Vec<float>::size(), wide);
  return {Vec<double>::loadu(wide), Vec<double>::loadu(wide + Vec<double>::size())};
#endif
}

// Halves are added, then quarters and so on: in registers where the compiler would go through memory.
inline double sum_of_lanes(const Vec<double>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512d all = v;
  const __m256d half = _mm256_add_pd(_mm512_castpd512_pd256(all), _mm512_extractf64x4_pd(all, 1));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256d half = v;
#endif
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  const __m128d quarter = _mm_add_pd(_mm256_castpd256_pd128(half), _mm256_extractf128_pd(half, 1));
  return _mm_cvtsd_f64(quarter) + _mm_cvtsd_f64(_mm_unpackhi_pd(quarter, quarter));
#else
  constexpr int64_t width = Vec<double>::size();
  alignas(64) double lanes[width];
  v.store(lanes);
  for (int64_t half = width / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
#endif
}

// A vector as the compiler's own type, where there is one. Comparisons of these give masks, which select() takes; those
// of at::vec turn the masks of AVX-512 into vectors, and its blendv turns them back.
#if defined(CPU_CAPABILITY_AVX512)
inline __m512 comparable(const Vec<float>& v) { return v; }
inline __m512d comparable(const Vec<double>& v) { return v; }
#elif defined(CPU_CAPABILITY_AVX2)
inline __m256 comparable(const Vec<float>& v) { return v; }
inline __m256d comparable(const Vec<double>& v) { return v; }
#else
template <typename A>
const Vec<A>& comparable(const Vec<A>& v) {
  return v;
}
#endif

template <typename A, typename Mask>
__attribute__((always_inline)) inline Vec<A> select(const Mask& which, const Vec<A>& a, const Vec<A>& b) {
  if constexpr (std::is_same_v<Mask, Vec<A>>)
    return Vec<A>::blendv(b, a, which);
  else
    return which ? comparable(a) : comparable(b);
}

// v * 2^n for whole numbers n, also where 2^n alone is none that fp32 has.
inline Vec<float> times_power_of_two(const Vec<float>& v, const Vec<float>& n) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_scalef_ps(v, n);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i all = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(all, 1);
  const auto power = [](__m256i e) {
    return Vec<float>(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23)));
  };
  return v * power(half) * power(_mm256_sub_epi32(all, half));
#else
  float values[Vec<float>::size()], exponents[Vec<float>::size()];
  v.store(values), n.store(exponents);
  for (int64_t l = 0; l < Vec<float>::size(); ++l)
    values[l] = exponents[l] == exponents[l] ? std::ldexp(values[l], static_cast<int>(exponents[l])) : exponents[l];
  return Vec<float>::loadu(values);
#endif
}

// Writes past the caches, for an output that would only push its own input out of them. `p` is aligned to a vector.
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

// Orders streamed writes before all writes that follow.
inline void stream_fence() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

template <bool kStream, typename T, int V>
__attribute__((always_inline)) inline void store_block(T* p, const Block<Acc<T>, V>& block) {
  narrow<T>(block, [&](const Vec<T>& part, int64_t first) __attribute__((always_inline)) {
    if constexpr (kStream)
      stream(part, p + first);
    else
      part.store(p + first);
  });
}

// What a map or a sum knows of the cells of a vector's lanes.
template <typename A, int kCount>
using Coefficients = std::array<Vec<A>, kCount>;

// The same, read from rows of a table when they are needed: of an array of many, GCC 12 leaves a copy on the stack for
// each vector.
template <typename A>
struct CoefficientsAt {
  const A* const* rows;
  int64_t column;

  Vec<A> operator[](int i) const { return Vec<A>::loadu(rows[i] + column); }
};

// Asks for the full blocks further on, which may be past the end. For maps and sums with an activation, whose
// arithmetic fills the processor before it comes to the loads that follow.
template <typename T, typename... More>
__attribute__((always_inline)) inline void prefetch_ahead(const T* p, const More*... more) {
  constexpr int64_t ahead = 2048 / sizeof(T), line = 64 / sizeof(T);
  for (int64_t i = 0; i < kLanes<Acc<T>>; i += line) __builtin_prefetch(p + ahead + i);
  if constexpr (sizeof...(More) > 0) prefetch_ahead(more...);
}

}  // namespace batchnorm_ext::cpu
