// 16-bit floats: binary16 and bfloat16 to float32 and back, rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace polybit {

static inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  // shift exponent and mantissa into place, then let a multiplication by 2^112 correct the exponent's bias
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFF) << 13;
  float value;
  std::memcpy(&value, &magnitude, 4);
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits |= sign | ((half & 0x7C00) == 0x7C00 ? 0x7F800000u : 0u);
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline uint16_t float_to_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

static inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00);
  if (bits >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00);  // 65520 and above
  if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the value, in steps of 2^-24, in the low bits
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000u));
  }
  bits += 0xC8000FFFu + ((bits >> 13) & 1);  // exponent bias 127 -> 15, and round to nearest even
  return static_cast<uint16_t>(sign | (bits >> 13));
}

}  // namespace polybit
