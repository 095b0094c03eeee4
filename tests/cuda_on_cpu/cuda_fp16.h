// float16 with a GPU's conversions: round to nearest, ties to even; every NaN becomes the same NaN.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;  // sign, 5 bits of the exponent, 10 of the fraction
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                    : std::ldexp(float(fraction), -24);
  return x.bits >> 15 ? -size : size;
}

inline __half __float2half_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const float size = std::fabs(x);
  const int sign = std::signbit(x) << 15;
  if (size >= 65520) return {uint16_t(sign | 31 << 10)};
  const int exponent = std::max(std::ilogb(size), -14);
  const int steps = std::nearbyint(std::ldexp(size, 10 - exponent));  // >= 1024 unless subnormal
  return {uint16_t(sign | (((exponent + 14) << 10) + steps))};
}
