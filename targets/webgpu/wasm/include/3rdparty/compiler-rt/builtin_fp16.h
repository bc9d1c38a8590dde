// Stand-in for a header that the wheel leaves out: a half as a float, under compiler-rt's name.
#pragma once

#include <cstdint>
#include <cstring>

template <typename Half, typename HalfBits, int kHalfMantissa, typename Float, typename FloatBits,
          int kFloatMantissa>
Float __extendXfYf2__(Half half) {
  static_assert(kHalfMantissa == 10 && kFloatMantissa == 23 && sizeof(Float) == 4, "f16 to f32");
  uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  if (exponent == 0) {  // zeros and subnormals: mantissa * 2^-24
    Float value = static_cast<Float>(mantissa) / 16777216;
    return sign ? -value : value;
  }
  uint32_t shifted = exponent == 31 ? 255 : exponent + 112;
  uint32_t bits = sign | shifted << 23 | mantissa << 13;
  Float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
