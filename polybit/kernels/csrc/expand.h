// Expanding planes. Bit i of byte 4r+t of a block belongs to row r and column 4i+t. Stage 1 interleaves the bits of
// planes (0,1) and (2,3) to 2-bit fields, stage 2 makes nibbles, stage 3 bytes; each stage is a bitwise select, and the
// result u[i] holds, for every row, the codes of columns 4i..4i+3 next to each other – the operand of a dot product.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(POLYBIT_UNROLL)
#elif defined(__clang__)
#define POLYBIT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define POLYBIT_UNROLL _Pragma("GCC unroll 16")
#endif
#define POLYBIT_INLINE inline __attribute__((always_inline))

namespace polybit {
namespace {

// How the codes of width B meet a tile of M tokens.
template <class I, int B, int M>
struct Shape {
  // Codes may stay at different bit positions (fields) of a byte, each with its own accumulator: that saves shifts
  // where a tile is small enough for the registers.
  static constexpr int fields = !I::wide ? 1 : B == 1 && M <= 2 ? 8 : B == 2 && M <= 2 ? 4 : B <= 4 && M <= 4 ? 2 : 1;
  // Several accumulators per field hide the latency of the dot product.
  static constexpr int copies = fields * M >= 4 || !I::wide ? 1 : 4 / (fields * M);
  static constexpr int slots = fields * copies;
  // A code p appears as p * unit.
  static constexpr int unit = fields >= 4 ? 1 : B <= 4 ? 1 << (4 - B) : 1 << (8 - B);
};

template <class I, int B, int P>
POLYBIT_INLINE void expand_pair(const uint8_t* block, size_t stride, typename I::Bytes& odd, typename I::Bytes& even) {
  const auto high = I::load(block + P * stride);
  if constexpr (P + 1 < B) {
    const auto low = I::load(block + (P + 1) * stride);
    odd = I::select(0xAA, high, I::template right<1>(low));
    even = I::select(0xAA, I::template left<1>(high), low);
  } else {
    odd = I::mask(high, 0xAA);
    even = I::mask(I::template left<1>(high), 0xAA);
  }
}

// Planes P..P+3 as nibbles: nibble[s] holds column group s in its low and s+4 in its high half.
template <class I, int B, int P>
POLYBIT_INLINE void expand_nibbles(const uint8_t* block, size_t stride, typename I::Bytes* nibble) {
  typename I::Bytes odd, even;
  expand_pair<I, B, P>(block, stride, odd, even);
  if constexpr (P + 2 < B) {
    typename I::Bytes odd_low, even_low;
    expand_pair<I, B, P + 2>(block, stride, odd_low, even_low);
    nibble[0] = I::select(0xCC, I::template left<2>(even), even_low);
    nibble[1] = I::select(0xCC, I::template left<2>(odd), odd_low);
    nibble[2] = I::select(0xCC, even, I::template right<2>(even_low));
    nibble[3] = I::select(0xCC, odd, I::template right<2>(odd_low));
  } else {
    nibble[0] = I::mask(I::template left<2>(even), 0xCC);
    nibble[1] = I::mask(I::template left<2>(odd), 0xCC);
    nibble[2] = I::mask(even, 0xCC);
    nibble[3] = I::mask(odd, 0xCC);
  }
}

// Four registers of nibbles as eight registers of bytes 0..15.
template <class I>
POLYBIT_INLINE void spread_nibbles(const typename I::Bytes* nibble, typename I::Bytes* u) {
  POLYBIT_UNROLL
  for (int s = 0; s < 4; ++s) {
    u[s] = I::mask(nibble[s], 0x0F);
    u[s + 4] = I::mask(I::template right<4>(nibble[s]), 0x0F);
  }
}

// u[i] = codes of columns 4i..4i+3, each in its field.
template <class I, int B, int Fields>
POLYBIT_INLINE void expand(const uint8_t* block, size_t stride, typename I::Bytes* u) {
  using Bytes = typename I::Bytes;
  if constexpr (Fields == 8) {
    const Bytes bits = I::load(block);
    POLYBIT_UNROLL
    for (int i = 0; i < 8; ++i) u[i] = I::mask(bits, 1 << i);
  } else if constexpr (Fields == 4) {
    Bytes odd, even;
    expand_pair<I, B, 0>(block, stride, odd, even);
    POLYBIT_UNROLL
    for (int f = 0; f < 4; ++f) {
      u[2 * f] = I::mask(even, 3 << (2 * f));
      u[2 * f + 1] = I::mask(odd, 3 << (2 * f));
    }
  } else if constexpr (Fields == 2) {
    Bytes nibble[4];
    expand_nibbles<I, B, 0>(block, stride, nibble);
    POLYBIT_UNROLL
    for (int s = 0; s < 4; ++s) {
      u[s] = I::mask(nibble[s], 0x0F);
      u[s + 4] = I::mask(nibble[s], 0xF0);
    }
  } else if constexpr (B <= 4) {
    Bytes nibble[4];
    expand_nibbles<I, B, 0>(block, stride, nibble);
    spread_nibbles<I>(nibble, u);
  } else {
    Bytes high[4], low[4];
    expand_nibbles<I, B, 0>(block, stride, high);
    expand_nibbles<I, B, 4>(block, stride, low);
    POLYBIT_UNROLL
    for (int s = 0; s < 4; ++s) {
      u[s] = I::select(0xF0, I::template left<4>(high[s]), low[s]);
      u[s + 4] = I::select(0xF0, high[s], I::template right<4>(low[s]));
    }
  }
}

}  // namespace
}  // namespace polybit
