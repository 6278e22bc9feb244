// __half and __nv_bfloat16: storage, and conversions that round to the nearest even as CUDA's do.
#pragma once

#include <bit>
#include <cstdint>

struct __half {
  unsigned short bits;
};
struct __nv_bfloat16 {
  unsigned short bits;
};

namespace emulator {

constexpr std::uint32_t kSign = 0x80000000u, kFloatInfinity = 0x7f800000u;
constexpr unsigned short kCanonicalNan = 0x7fff;  // what the GPU makes of every NaN, in both formats

constexpr float half_to_float(std::uint32_t half) {
  const std::uint32_t sign = (half & 0x8000) << 16, magnitude = (half & 0x7fff) << 13;
  constexpr std::uint32_t infinity = 0x7c00 << 13, smallest_normal = 0x0400 << 13, rebias = (127 - 15) << 23;
  if (magnitude >= infinity) return std::bit_cast<float>(sign | kFloatInfinity | magnitude);
  if (magnitude >= smallest_normal) return std::bit_cast<float>(sign | (magnitude + rebias));
  const float subnormal = static_cast<float>(half & 0x7fff) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

constexpr unsigned short float_to_half(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value), sign = (bits & kSign) >> 16,
                      magnitude = bits & ~kSign;
  constexpr std::uint32_t overflow = std::bit_cast<std::uint32_t>(65520.0f), rebias = (127 - 15) << 23;
  constexpr std::uint32_t smallest_normal = std::bit_cast<std::uint32_t>(0x1p-14f);
  if (magnitude > kFloatInfinity) return kCanonicalNan;
  if (magnitude >= overflow) return static_cast<unsigned short>(sign | 0x7c00);
  if (magnitude < smallest_normal) {
    // The last place of a float in [0.5, 1) is that of a subnormal half, so the addition does the rounding.
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<unsigned short>(sign | (std::bit_cast<std::uint32_t>(sum) - std::bit_cast<std::uint32_t>(0.5f)));
  }
  const std::uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<unsigned short>(sign | ((rounded - rebias) >> 13));
}

constexpr unsigned short float_to_bfloat16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & ~kSign) > kFloatInfinity) return kCanonicalNan;
  return static_cast<unsigned short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace emulator

constexpr unsigned short __half_as_ushort(__half value) { return value.bits; }
constexpr __half __ushort_as_half(unsigned short bits) { return {bits}; }
constexpr float __half2float(__half value) { return emulator::half_to_float(value.bits); }
constexpr __half __float2half_rn(float value) { return {emulator::float_to_half(value)}; }

constexpr unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
constexpr __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
constexpr float __bfloat162float(__nv_bfloat16 value) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}
constexpr __nv_bfloat16 __float2bfloat16_rn(float value) { return {emulator::float_to_bfloat16(value)}; }
