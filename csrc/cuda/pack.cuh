// Elements as they are moved: kWidth of them in one load or store, widened to the accumulation type to compute.
#pragma once

#include <type_traits>

#include "../host_device.h"
#include "device.cuh"

namespace batchnorm_ext::cuda {

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

BATCHNORM_EXT_HD double widen(double v) { return v; }
BATCHNORM_EXT_HD float widen(float v) { return v; }
BATCHNORM_EXT_HD float widen(__half v) { return __half2float(v); }
BATCHNORM_EXT_HD float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
BATCHNORM_EXT_HD T narrow(Acc<T> v) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(v);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(v);
  else
    return v;
}

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T v[kWidth];

  __device__ __forceinline__ Acc<T> get(int i) const { return widen(v[i]); }
  template <typename F>
  __device__ __forceinline__ void fill(const F& f) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) v[i] = narrow<T>(f(i));
  }
};

// Halves stay in pairs until they are needed: apart they would take a register each.
template <typename T, int kWidth>
  requires(sizeof(T) == 2 && kWidth > 1)
struct alignas(sizeof(T) * kWidth) Pack<T, kWidth> {
  unsigned v[kWidth / 2];

  __device__ __forceinline__ float get(int i) const {
    const unsigned pair = v[i / 2];
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      return __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
    else
      return widen(__ushort_as_half(static_cast<unsigned short>(i % 2 == 0 ? pair : pair >> 16)));
  }
  template <typename F>
  __device__ __forceinline__ void fill(const F& f) {
#pragma unroll
    for (int i = 0; i < kWidth; i += 2) v[i / 2] = narrow_pair<T>(f(i), f(i + 1));
  }
};

// The pack of f(0), f(1)...
template <typename T, int kWidth, typename F>
__device__ __forceinline__ Pack<T, kWidth> make_pack(const F& f) {
  Pack<T, kWidth> pack;
  pack.fill(f);
  return pack;
}

template <int kWidth, typename T>
__device__ __forceinline__ Pack<T, kWidth> load_pack(const T* p, bool again) {
  const auto* const from = reinterpret_cast<const Pack<T, kWidth>*>(p);
  return again ? *from : load_streaming(from);
}

template <typename T, int kWidth>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, kWidth>& pack) {
  *reinterpret_cast<Pack<T, kWidth>*>(p) = pack;
}

// One value per channel, of fp32 or of the input's type. Absent ones have no data.
template <typename T>
struct Channels {
  void* data = nullptr;
  int64_t stride = 1;
  bool is_float = true;

  __device__ __forceinline__ explicit operator bool() const { return data != nullptr; }
  __device__ __forceinline__ Acc<T> value(int64_t c, Acc<T> absent) const {
    if (data == nullptr) return absent;
    return is_float ? static_cast<const float*>(data)[c * stride] : widen(static_cast<const T*>(data)[c * stride]);
  }
  __device__ __forceinline__ double get(int64_t c, double absent = 0) const {
    return value(c, static_cast<Acc<T>>(absent));
  }
  __device__ __forceinline__ void set(int64_t c, double value) const {
    if (is_float)
      static_cast<float*>(data)[c * stride] = static_cast<float>(value);
    else
      static_cast<T*>(data)[c * stride] = narrow<T>(static_cast<Acc<T>>(value));
  }
};

}  // namespace batchnorm_ext::cuda
