// float16 with a GPU's conversions: round to nearest, ties to even; every NaN becomes the same NaN.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;  // sign, 5 bits of the exponent, 10 of the fraction

  __half() = default;
  explicit __half(float x) : bits(rounded(x)) {}

  explicit operator float() const {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                      : std::ldexp(float(fraction), -24);
    return bits >> 15 ? -size : size;
  }

  static uint16_t rounded(float x) {
    if (std::isnan(x)) return 0x7fff;
    const float size = std::fabs(x);
    const int sign = std::signbit(x) << 15;
    if (size >= 65520) return sign | 31 << 10;
    const int exponent = std::max(std::ilogb(size), -14);
    const int steps = std::nearbyint(std::ldexp(size, 10 - exponent));  // >= 1024 unless subnormal
    return sign | (((exponent + 14) << 10) + steps);
  }
};
