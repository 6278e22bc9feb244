// The message of SyncBatchNorm's forward: sums over the elements of each channel, which ranks add up.
//
// The sums are about zero, because the ranks have no other centre in common. Where the mean is 1e6 times the standard
// deviation, the sum of squares and n * mean^2 agree in all but their last bits, and in single doubles the variance
// would be lost. Each sum is therefore sent as two doubles. The first holds its leading 28 bits: such numbers add up
// without rounding as long as the total is less than 2^25 times each of them. The second holds the rest, less than
// 2^-27 of the sum, and rounds at 2^-80 of it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "math.h"

namespace batchnorm_ext {

// [S1, leading bits (C) | S1, rest (C) | S2, leading bits (C) | S2, rest (C) | n], S1 = sum(x), S2 = sum(x^2)
template <typename Size>  // a number or a symbol
constexpr Size sums_size(const Size& channels) {
  return channels * 4 + 1;
}

BATCHNORM_EXT_HD void write_count(double* sums, int64_t channels, double n) { sums[4 * channels] = n; }
BATCHNORM_EXT_HD double read_count(const double* sums, int64_t channels) { return sums[4 * channels]; }

// The leading 28 bits, truncated. Infinities and NaN stay.
BATCHNORM_EXT_HD double leading_bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= ~uint64_t{0} << 25;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

// The sums of channel c: n elements with this mean and M2. The differences of nearly equal numbers are written as
// fma(), so that a compiler that contracts changes nothing.
BATCHNORM_EXT_HD void write_sums(double* sums, int64_t channels, int64_t c, double n, double mean, double m2) {
  const double square = mean * mean, square_rest = std::fma(mean, mean, -square);
  const double s1 = leading_bits(n * mean), s1_rest = std::fma(n, mean, -s1);
  const double s2 = leading_bits(std::fma(n, square, m2));
  const double s2_rest = std::fma(n, square, -s2) + std::fma(n, square_rest, m2);
  sums[c] = s1;
  sums[channels + c] = is_finite(s1) ? s1_rest : 0;
  sums[2 * channels + c] = s2;
  sums[3 * channels + c] = is_finite(s2) ? s2_rest : 0;
}

// The moments computed from the sums of one or more batches:
//   M2 = sum((x - mean)^2) = S2 - mean * S1 - mean * (S1 - n * mean)
// which holds for a rounded mean up to (S1 - n * mean)^2 / n, 2^-106 of n * mean^2.
//
// M2 below 2^-70 of n * mean^2, or below the normal range, is set to 0: an M2 this small can be rounding error alone,
// and a constant channel must have variance 0. Rounding reaches the bound with 600 ranks in the worst case, with about
// 70,000 if rounding errors are independent.
// No float32 channel of less than 2^22 elements has so small a variance unless it is constant.
BATCHNORM_EXT_HD Moments read_sums(const double* sums, int64_t channels, int64_t c) {
  const double n = read_count(sums, channels);
  const double *const p1 = sums + c, *const p2 = p1 + 2 * channels;
  const double s1 = p1[0] + p1[channels], s1_rest = p1[channels] - (s1 - p1[0]);
  const double s2 = p2[0] + p2[channels], s2_rest = p2[channels] - (s2 - p2[0]);
  const double quotient = s1 / n;
  const double mean = quotient + (std::fma(-n, quotient, s1) + s1_rest) / n;
  const double remainder = std::fma(-n, mean, s1) + s1_rest;
  const double m2 = std::fma(-mean, s1, s2) + (s2_rest - mean * (s1_rest + remainder));
  const double noise = 0x1p-70 * (mean * s1) + 0x1p-1022 * n;
  // An infinite sum has no rest. NaN stays.
  return {is_finite(quotient) ? mean : quotient, is_finite(s2) ? (m2 < noise ? 0 : m2) : s2};
}

}  // namespace batchnorm_ext
