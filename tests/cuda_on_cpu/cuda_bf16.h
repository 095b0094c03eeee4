// bfloat16 with a GPU's conversions: round to nearest, ties to even; every NaN becomes the same NaN.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

struct __nv_bfloat16 {
  uint16_t bits;  // the upper half of a float

  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    const uint32_t all = std::bit_cast<uint32_t>(x);
    bits = std::isnan(x) ? 0x7fff : (all + 0x7fff + (all >> 16 & 1)) >> 16;
  }
  explicit operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};
