// Random shapes, widths per group, fused weights and low-rank parts through every kernel this processor can run, in
// buffers of exactly the documented size, against a literal sum in double precision. Built with the address and undefined-behaviour sanitizers by test_sanitized.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "linear.h"
#include "stored.h"

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

// The bits of a code that are read, as one number, and where the group's scale is.
struct Spot {
  int code;
  size_t slot;
};

static Spot place_of(const Stored& s, const std::vector<int>& widths, int row, int column) {
  const int rb = row / 16, r = row % 16, kb = column / 32, k = column % 32, i = k / 4, t = k % 4;
  const int row_blocks = (s.rows + 15) / 16, blocks = (s.columns + 31) / 32;
  const int each = s.group_size ? s.group_size / 32 : blocks, g = kb / each, groups = (blocks + each - 1) / each;
  const auto bits = [&](int of) { return s.group_bits.empty() ? s.bits : s.group_bits[of]; };
  size_t part = 0, slot = 0;
  int first = 0, held = 0;
  for (int of = 0; of < groups; ++of) {
    const int length = std::min(each, blocks - of * each);
    if (bits(of) == bits(g)) {
      held += length;
      if (of < g) first += length, ++slot;
    } else if (bits(of) > bits(g)) {
      part += size_t(length) * bits(of) * row_blocks * 64, ++slot;
    }
  }
  const size_t stride = s.group_bits.empty() ? s.plane_stride : size_t(row_blocks) * held * 64;
  int code = 0;
  for (int plane = 0; plane < widths[g]; ++plane) {
    const size_t at = part + plane * stride + (size_t(rb) * held + first + kb - g * each) * 64 + 4 * r + t;
    code = 2 * code + ((s.planes[at] >> i) & 1);
  }
  return {code, size_t(rb) * groups + slot};
}

static float value_of(const Stored& s, const std::vector<int>& widths, int row, int column) {
  const Spot place = place_of(s, widths, row, column);
  const int r = row % 16, g = s.group_size ? column / s.group_size : 0, read = widths[g];
  const int bits = s.group_bits.empty() ? s.bits : s.group_bits[g];
  const auto middle = [](int b) { return ((1 << b) - 1) / 2.0; };
  const double scale = 0.0078125 * (1 + r);  // what check() stored as binary16
  const double zero = s.zero ? s.zero[place.slot * 16 + r] : middle(bits) - (middle(s.bits) - s.fixed_zero);
  const Ratio& ratio = s.ratio[read];
  const int nibble = ratio.index ? (r < 8 ? ratio.index[place.slot * 8 + r] & 15 : ratio.index[place.slot * 8 + r - 8] >> 4) : 0;
  const double step = std::ldexp(read < bits ? ratio.levels[nibble] : 1.0f, bits - read);
  return scale * (step * (place.code - middle(read)) + middle(bits) - zero) * s.gain;
}

// What a weight is made of, in memory of exactly the right size, and a way to read it.
struct Sample {
  Stored s{};
  std::vector<int> widths;
  std::unique_ptr<Exact<uint8_t>> planes, zero, ratio[9];
  std::unique_ptr<Exact<uint16_t>> scale;
  std::unique_ptr<Reading> reading;

  Sample(int rows, int columns, int group_size) {
    const int blocks = (columns + 31) / 32, each = group_size ? group_size / 32 : blocks, row_blocks = (rows + 15) / 16;
    const int count = (blocks + each - 1) / each;
    s.rows = rows;
    s.columns = columns;
    s.group_size = group_size;
    s.gain = 0.5f;
    s.bits = 1 + draw(8);
    size_t bytes = 0;
    if (group_size && draw(2)) {
      s.bits = 1;
      for (int g = 0; g < count; ++g) s.group_bits.push_back(1 + draw(8)), s.bits = std::max(s.bits, s.group_bits[g]);
    }
    const bool several = draw(2);
    const int common = 1 + draw(s.bits);
    for (int g = 0; g < count; ++g) {
      const int bits = s.group_bits.empty() ? s.bits : s.group_bits[g];
      widths.push_back(several ? 1 + draw(bits) : std::min(common, bits));
      bytes += size_t(std::min(each, blocks - g * each)) * bits * row_blocks * 64;
    }
    s.plane_stride = size_t(row_blocks) * blocks * 64;
    planes = std::make_unique<Exact<uint8_t>>(bytes);
    for (size_t i = 0; i < planes->count; ++i) (*planes)[i] = draw(256);
    s.planes = planes->data.get();
    const size_t groups = size_t(row_blocks) * count;
    scale = std::make_unique<Exact<uint16_t>>(groups * 16);
    for (size_t i = 0; i < scale->count; ++i) {
      // binary16 of (1 + r) / 128: 1 + r has few bits, so the conversion is a search for its leading one
      const int r = 1 + i % 16;
      int e = 0;
      while ((r >> (e + 1)) != 0) ++e;
      (*scale)[i] = static_cast<uint16_t>(((e - 7 + 15) << 10) | ((r - (1 << e)) << (10 - e)));
    }
    s.scale = scale->data.get();
    s.fixed_zero = ((1 << s.bits) - 1) * 0.5f;
    if (draw(2)) {
      zero = std::make_unique<Exact<uint8_t>>(groups * 16);
      for (size_t i = 0; i < zero->count; ++i) (*zero)[i] = draw(1 << s.bits);
      s.zero = zero->data.get();
    }
    for (int b = 1; draw(2) && b < 9; ++b) {
      for (int i = 0; i < 16; ++i) s.ratio[b].levels[i] = 0.5f + i / 16.0f;
      ratio[b] = std::make_unique<Exact<uint8_t>>(groups * 8);
      for (size_t i = 0; i < ratio[b]->count; ++i) (*ratio[b])[i] = draw(256);
      s.ratio[b].index = ratio[b]->data.get();
    }
    reading = several ? std::make_unique<Reading>(s, widths) : std::make_unique<Reading>(s, common);
  }
};

// A low-rank part whose numbers are few-bit multiples, exact in binary16.
struct Part {
  int rank;
  Exact<uint16_t> down, up;
  Adapter adapter;

  Part(int rows, int columns)
      : rank(1 + draw(20)), down(size_t(rank) * ((columns + 31) / 32) * 32), up(size_t(rank) * ((rows + 15) / 16) * 16) {
    for (size_t i = 0; i < down.count; ++i) down[i] = draw(2) ? 0x3400 : 0xB000;  // 0.25, -0.125
    for (size_t i = 0; i < up.count; ++i) up[i] = draw(2) ? 0x2C00 : 0xB400;      // 0.0625, -0.25
    adapter = {down.data.get(), up.data.get(), rank, 0.5f};
  }

  double value(int row, int column, int columns) const {
    const int padded = (columns + 31) / 32 * 32;
    double sum = 0;
    for (int j = 0; j < rank; ++j)
      sum += (down.data[size_t(j) * padded + column] == 0x3400 ? 0.25 : -0.125) *
             (up.data[(size_t(row / 16) * rank + j) * 16 + row % 16] == 0x2C00 ? 0.0625 : -0.25);
    return 0.5 * sum;
  }
};

static int check(const Kernels& kernels, int round) {
  const int groups_of[] = {0, 32, 64, 128, 256};
  const int group_size = groups_of[draw(5)], columns = 1 + draw(500), count = 1 + draw(3);
  const int tokens = 1 + draw(draw(2) ? 40 : 4), digits = 1 + draw(2);
  Exact<float> x(size_t(tokens) * columns);
  for (size_t i = 0; i < x.count; ++i) x[i] = draw_float();
  std::vector<std::unique_ptr<Sample>> samples;
  std::vector<std::unique_ptr<Part>> parts;
  std::vector<std::unique_ptr<Exact<float>>> ys, biases;
  std::vector<Member> members;
  for (int n = 0; n < count; ++n) {
    const int rows = 1 + draw(70);
    samples.push_back(std::make_unique<Sample>(rows, columns, group_size));
    parts.push_back(draw(2) ? std::make_unique<Part>(rows, columns) : nullptr);
    ys.push_back(std::make_unique<Exact<float>>(size_t(tokens) * rows));
    biases.push_back(std::make_unique<Exact<float>>(rows));
    for (int i = 0; i < rows; ++i) (*biases[n])[i] = draw_float();
    members.push_back({&samples[n]->reading->weight(), ys[n]->data.get(), biases[n]->data.get(), Type::float32,
                       parts[n] ? &parts[n]->adapter : nullptr});
  }
  linear(kernels, {x.data.get(), Type::float32, tokens, nullptr, digits}, members.data(), count);
  for (int n = 0; n < count; ++n) {
    const Stored& s = samples[n]->s;
    Exact<float> decoded(size_t(s.rows) * columns);
    decode(kernels, samples[n]->reading->weight(), nullptr, decoded.data.get());
    for (int o = 0; o < s.rows; ++o) {
      for (int j = 0; j < columns; ++j) {
        const double expected = value_of(s, samples[n]->widths, o, j);
        if (std::fabs(decoded[size_t(o) * columns + j] - expected) > 1e-5 * (1 + std::fabs(expected)))
          return std::printf("%s round %d: decode differs at %d %d\n", kernels.name, round, o, j), 1;
      }
      for (int t = 0; t < tokens; ++t) {
        double exact = (*biases[n])[o], size = 0, weights = 0, largest = 0;
        for (int j = 0; j < columns; ++j) {
          const double one = double(x[size_t(t) * columns + j]);
          const double added = parts[n] ? parts[n]->value(o, j, columns) : 0.0;
          const double weight = decoded[size_t(o) * columns + j];
          exact += one * (weight + added);
          size += std::fabs(one) * (std::fabs(weight) + (parts[n] ? parts[n]->rank * 0.04 : 0.0));
          weights += std::fabs(weight);
          largest = std::fmax(largest, std::fabs(one));
        }
        // no activation moves further than half a step of its chunk, and the rest is float32 arithmetic
        const double tolerance = 0.501 * largest / (digits == 2 ? 32512 : 127) * weights + 1e-5 * size + 1e-6;
        const float y = (*ys[n])[size_t(t) * s.rows + o];
        if (!(std::fabs(y - exact) <= tolerance))
          return std::printf("%s round %d: member %d, %dx%d bits %d tokens %d digits %d: %g, not %g\n", kernels.name,
                             round, n, s.rows, columns, s.bits, tokens, digits, y, exact), 1;
      }
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
