// Random shapes through every kernel this processor can run, in buffers of exactly the documented size, against a
// literal sum in double precision. Built with the address and undefined-behaviour sanitizers by test_sanitized.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "linear.h"

using namespace polybit;

static uint64_t state = 88172645463325252ull;
static uint32_t draw(uint32_t below) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return static_cast<uint32_t>((state >> 11) % below);
}
static float draw_float() { return (static_cast<int>(draw(20001)) - 10000) / 5000.0f; }

// Heap memory of exactly `count` values, so that one byte read beyond is seen.
template <class T>
struct Exact {
  std::unique_ptr<T[]> data;
  size_t count;
  explicit Exact(size_t n) : data(new T[n]), count(n) {}
  T& operator[](size_t i) { return data[i]; }
};

static float value_of(const Weight& w, int row, int column) {
  const int rb = row / 16, r = row % 16, kb = column / 32, k = column % 32, i = k / 4, t = k % 4;
  int p = 0;
  for (int plane = 0; plane < w.width; ++plane) {
    const uint8_t byte = w.planes[plane * w.plane_stride + (size_t(rb) * w.column_blocks + kb) * 64 + 4 * r + t];
    p = 2 * p + ((byte >> i) & 1);
  }
  const size_t group = size_t(rb) * w.groups + ((kb / w.chunk_blocks) >> w.group_shift);
  const double scale = 0.0078125 * (1 + r);  // what main() stored as binary16
  const double zero = w.zero ? w.zero[group * 16 + r] : w.fixed_zero;
  const int nibble = w.ratio ? (r < 8 ? w.ratio[group * 8 + r] & 15 : w.ratio[group * 8 + r - 8] >> 4) : 0;
  const double step = std::ldexp(w.ratios[nibble], w.bits - w.width);
  return scale * (step * (p - ((1 << w.width) - 1) / 2.0) + ((1 << w.bits) - 1) / 2.0 - zero) * w.gain;
}

static int check(const Kernels& kernels, int round) {
  const int groups_of[] = {0, 32, 64, 128, 256};
  const int group_size = groups_of[draw(5)];
  Weight w{};
  w.bits = 1 + draw(8);
  w.width = 1 + draw(w.bits);
  w.rows = 1 + draw(70);
  w.columns = 1 + draw(500);
  w.row_blocks = (w.rows + 15) / 16;
  w.column_blocks = (w.columns + 31) / 32;
  w.groups = group_size ? (w.columns + group_size - 1) / group_size : 1;
  w.chunk_blocks = group_size == 32 ? 1 : group_size == 64 ? 2 : 4;
  w.group_shift = group_size == 0 ? 31 : group_size == 256 ? 1 : 0;
  w.chunks = (w.column_blocks + w.chunk_blocks - 1) / w.chunk_blocks;
  w.gain = 0.5f;
  w.fixed_zero = ((1 << w.bits) - 1) * 0.5f;
  w.plane_stride = size_t(w.row_blocks) * w.column_blocks * 64;
  Exact<uint8_t> planes(w.plane_stride * w.width);
  for (size_t i = 0; i < planes.count; ++i) planes[i] = draw(256);
  const size_t groups = size_t(w.row_blocks) * w.groups;
  Exact<uint16_t> scale(groups * 16);
  for (size_t i = 0; i < scale.count; ++i) {
    // binary16 of (1 + r) / 128: 1 + r has few bits, so the conversion is a search for its leading one
    const int r = 1 + i % 16;
    int e = 0;
    while ((r >> (e + 1)) != 0) ++e;
    scale[i] = static_cast<uint16_t>(((e - 7 + 15) << 10) | ((r - (1 << e)) << (10 - e)));
  }
  Exact<uint8_t> zero(groups * 16), ratio(groups * 8);
  for (size_t i = 0; i < zero.count; ++i) zero[i] = draw(1 << w.bits);
  for (size_t i = 0; i < ratio.count; ++i) ratio[i] = draw(256);
  const bool with_ratio = draw(2);
  for (int i = 0; i < 16; ++i) w.ratios[i] = with_ratio ? 0.5f + i / 16.0f : 1.0f;
  w.planes = planes.data.get();
  w.scale = scale.data.get();
  w.zero = draw(2) ? zero.data.get() : nullptr;
  w.ratio = with_ratio ? ratio.data.get() : nullptr;

  const int tokens = 1 + draw(draw(2) ? 40 : 4), digits = 1 + draw(2);
  Exact<float> x(size_t(tokens) * w.columns), y(size_t(tokens) * w.rows), bias(w.rows);
  for (size_t i = 0; i < x.count; ++i) x[i] = draw_float();
  for (size_t i = 0; i < bias.count; ++i) bias[i] = draw_float();
  linear(kernels, w, {x.data.get(), Type::float32, tokens, nullptr, digits},
         {y.data.get(), bias.data.get(), Type::float32});
  Exact<float> decoded(size_t(w.rows) * w.columns);
  decode(kernels, w, nullptr, decoded.data.get());

  for (int o = 0; o < w.rows; ++o) {
    for (int j = 0; j < w.columns; ++j)
      if (std::fabs(decoded[size_t(o) * w.columns + j] - value_of(w, o, j)) > 1e-5 * (1 + std::fabs(value_of(w, o, j))))
        return std::printf("%s round %d: decode differs at %d %d\n", kernels.name, round, o, j), 1;
    for (int t = 0; t < tokens; ++t) {
      double exact = bias[o], size = 0, weights = 0, largest = 0;
      for (int j = 0; j < w.columns; ++j) {
        const double one = double(x[size_t(t) * w.columns + j]) * decoded[size_t(o) * w.columns + j];
        exact += one;
        size += std::fabs(one);
        weights += std::fabs(decoded[size_t(o) * w.columns + j]);
        largest = std::fmax(largest, std::fabs(x[size_t(t) * w.columns + j]));
      }
      // no activation moves further than half a step of its chunk, and the rest is float32 arithmetic
      const double tolerance = 0.501 * largest / (digits == 2 ? 32512 : 127) * weights + 1e-5 * size + 1e-6;
      if (!(std::fabs(y[size_t(t) * w.rows + o] - exact) <= tolerance))
        return std::printf("%s round %d: %dx%d bits %d width %d tokens %d digits %d: %g, not %g\n", kernels.name, round,
                           w.rows, w.columns, w.bits, w.width, tokens, digits, y[size_t(t) * w.rows + o], exact), 1;
    }
  }
  return 0;
}

int main(int, char** argv) {
  const int rounds = std::atoi(argv[1]);
  int wrong = 0, ran = 0;
  for (const Kernels* kernels : {avx512_kernels(), avxvnni_kernels(), avx2_kernels(), neon_kernels(), portable_kernels()})
    if (kernels) {
      for (int round = 0; round < rounds; ++round, ++ran) wrong += check(*kernels, round);
    }
  std::printf("%d cases, %d wrong\n", ran, wrong);
  return wrong != 0;
}
