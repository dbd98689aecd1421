// What happens to the activations of one token: rounding to int8 digits, and the two halves of a low-rank part.
#pragma once

#include <cstring>

#include "expand.h"
#include "problem.h"

namespace polybit {
namespace {

// Nearest integer, ties to even, of |v| < 2^22; the reference rounds the same way.
POLYBIT_INLINE int32_t nearest(float v) {
  const float shifted = v + 12582912.0f;  // 1.5 * 2^23: its last bit counts ones
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  return bits - 0x4B400000;
}

static void round_activations(const float* x, int columns, int chunk, int8_t* high, int8_t* low, float* scale,
                              float* sum_high, float* sum_low) {
  const float levels = low ? 127.0f * 256.0f : 127.0f;
  for (int begin = 0, c = 0; begin < columns; begin += chunk, ++c) {
    const int count = columns - begin < chunk ? columns - begin : chunk;
    const float* in = x + begin;
    uint32_t top = 0;  // the order of magnitudes is the order of their bits, with infinity and NaN above all
    for (int j = 0; j < count; ++j) {
      uint32_t bits;
      std::memcpy(&bits, in + j, 4);
      bits &= 0x7FFFFFFFu;
      top = bits > top ? bits : top;
    }
    float largest;
    std::memcpy(&largest, &top, 4);
    const bool finite = top < 0x7F800000u;
    const float inverse = finite && largest >= 1e-30f ? levels / largest : 0.0f;
    const float step = finite ? largest / levels : __builtin_nanf("");
    int32_t total_high = 0, total_low = 0;
    if (!finite || inverse == 0.0f) {
      std::memset(high + begin, 0, count);
      if (low) std::memset(low + begin, 0, count);
    } else if (!low) {
      for (int j = 0; j < count; ++j) {
        const int32_t q = nearest(in[j] * inverse);
        high[begin + j] = static_cast<int8_t>(q);
        total_high += q;
      }
    } else {
      for (int j = 0; j < count; ++j) {
        const int32_t q = nearest(in[j] * inverse);
        const int32_t upper = (q + 128) >> 8;
        const int32_t lower = q - upper * 256;
        high[begin + j] = static_cast<int8_t>(upper);
        low[begin + j] = static_cast<int8_t>(lower);
        total_high += upper;
        total_low += lower;
      }
    }
    scale[c] = step;
    sum_high[c] = static_cast<float>(total_high);
    if (low) sum_low[c] = static_cast<float>(total_low);
  }
}

// out[rank] = down[rank][count] x; `count` is a multiple of 32.
template <class I>
void project(const uint16_t* down, int rank, int count, const float* x, float* out) {
  using Floats = typename I::Floats;
  for (int j = 0; j < rank; ++j, down += count) {
    Floats sum[2] = {I::set(0.0f), I::set(0.0f)};
    for (int i = 0; i < count; i += 2 * I::rows) {
      POLYBIT_UNROLL
      for (int k = 0; k < 2; ++k)
        sum[k] = I::fma(I::load_half(down + i + k * I::rows), I::load_floats(x + i + k * I::rows), sum[k]);
    }
    float lane[I::rows], total = 0.0f;
    I::store(lane, I::add(sum[0], sum[1]));
    for (int i = 0; i < I::rows; ++i) total += lane[i];
    out[j] = total;
  }
}

template <class I>
void lift(const uint16_t* up, int rank, const float* t, float* out) {
  for (int part = 0; part < kRows; part += I::rows) {
    typename I::Floats total = I::load_floats(out + part);
    for (int j = 0; j < rank; ++j) total = I::fma(I::load_half(up + j * kRows + part), I::set(t[j]), total);
    I::store(out + part, total);
  }
}

}  // namespace
}  // namespace polybit
