// The arithmetic and the number formats of the emulator, by their definitions.
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "emulator.h"
#include "expect.h"

namespace {

void arithmetic() {
  expect(__umulhi(0xffffffffu, 0xffffffffu) == 0xfffffffeu);
  expect(__ffs(0) == 0 && __ffs(1) == 1 && __ffs(0x50) == 5 && __ffs(INT_MIN) == 32);
  expect(__popc(0) == 0 && __popc(0xffffffffu) == 32 && __popc(0x50) == 2);
  expect(rsqrt(16.0) == 0.25);
  expect(__uint_as_float(0x3f800000u) == 1.0f);
  expect(alignof(uint2) == 8 && alignof(uint3) == 4 && alignof(uint4) == 16 && alignof(double2) == 16);
}

// A 16-bit format by its definition, to hold the conversions against.
struct Format {
  int mantissa_bits, bias;
  std::uint32_t infinity;

  double value(std::uint32_t bits) const {
    const int exponent = static_cast<int>((bits & 0x7fff) >> mantissa_bits), hidden = exponent ? 1 << mantissa_bits : 0;
    const int mantissa = static_cast<int>(bits & ((1u << mantissa_bits) - 1)) | hidden;
    return std::ldexp(bits >> 15 ? -mantissa : mantissa, std::max(exponent, 1) - bias - mantissa_bits);
  }
};

float towards(float value, double target) { return std::nextafterf(value, static_cast<float>(target)); }

// Rounding is monotonic, so the values, the points halfway between them and their neighbours are all there is to it.
template <typename FromFloat, typename ToFloat>
void check_format(const Format& format, const FromFloat& from_float, const ToFloat& to_float) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = to_float(bits);
    const std::uint32_t magnitude = bits & 0x7fff, even = bits & 1 ? bits + 1 : bits;
    if (magnitude > format.infinity) {
      expect(std::isnan(value) && (from_float(value) & 0x7fff) > format.infinity);
      continue;
    }
    expect(from_float(value) == bits);
    if (magnitude == format.infinity) {
      expect(value == (bits >> 15 ? -inf : inf));
      continue;
    }
    expect(value == format.value(bits) && std::signbit(value) == (bits >> 15 != 0));
    const double next = format.value(bits + 1);  // of the greatest: what would follow if there were no infinity
    const float halfway = static_cast<float>((value + next) / 2);
    expect(halfway == (value + next) / 2);
    expect(from_float(halfway) == even);
    expect(from_float(towards(halfway, value)) == bits);
    expect(from_float(std::nextafterf(halfway, value < next ? inf : -inf)) == bits + 1);
  }
  expect((from_float(std::numeric_limits<float>::quiet_NaN()) & 0x7fff) > format.infinity);
  expect(from_float(__uint_as_float(0x7f800001u)) == 0x7fff && from_float(__uint_as_float(0xffffffffu)) == 0x7fff);
  expect(from_float(std::numeric_limits<float>::max()) == format.infinity);
  expect(from_float(std::numeric_limits<float>::denorm_min()) == 0 && from_float(-0.0f) == 0x8000);
}

void half() {
  static_assert(sizeof(__half) == 2 && std::is_trivially_copyable_v<__half>);
  const auto from = [](float value) { return std::uint32_t{__half_as_ushort(__float2half_rn(value))}; };
  const auto to = [](std::uint32_t bits) { return __half2float(__ushort_as_half(static_cast<unsigned short>(bits))); };
  check_format({.mantissa_bits = 10, .bias = 15, .infinity = 0x7c00}, from, to);
}

void bfloat16() {
  static_assert(sizeof(__nv_bfloat16) == 2 && std::is_trivially_copyable_v<__nv_bfloat16>);
  const auto from = [](float value) { return std::uint32_t{__bfloat16_as_ushort(__float2bfloat16_rn(value))}; };
  const auto to = [](std::uint32_t bits) {
    return __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(bits)));
  };
  check_format({.mantissa_bits = 7, .bias = 127, .infinity = 0x7f80}, from, to);
}

}  // namespace

int main() {
  arithmetic();
  half();
  bfloat16();
}
