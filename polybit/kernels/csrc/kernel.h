// The kernels, written once over a small set of vector operations `I`; every instruction set includes this file.
// All names have internal linkage, so that code compiled for one processor is never linked into another's path.
#pragma once

#include <cstring>

#include "activations.h"
#include "expand.h"
#include "half.h"
#include "problem.h"

namespace polybit {
namespace {

// Fetches what is read some blocks later: the processor's own prefetching stops at every page and follows few streams.
// Distances and levels are the best of those tried on Zen 4, for 3 and 4 bits on a Xeon, whose memory answers later (512
// bytes took a fifth to a third longer there); narrow widths need their lines in the first level.
template <int B, int M, bool Mixed>
POLYBIT_INLINE void fetch_ahead(const uint8_t* block, size_t stride) {
  constexpr int distance = Mixed ? 512 : 2048;
  POLYBIT_UNROLL
  for (int p = 0; p < B; ++p) {
    const uint8_t* ahead = block + p * stride + distance;
    if constexpr (B <= 2 && M <= 2 && !Mixed) {
      __builtin_prefetch(ahead, 0, 0);
    } else if constexpr (B <= 4) {
      __builtin_prefetch(ahead, 0, 3);
    } else {
      __builtin_prefetch(ahead, 0, 2);
    }
  }
}

// Adds one block of 32 columns to the accumulators.
template <class I, int B, int M>
POLYBIT_INLINE void accumulate(const uint8_t* block, size_t stride, const int32_t* codes,
                               typename I::Ints (&sum)[M][Shape<I, B, M>::slots]) {
  using S = Shape<I, B, M>;
  typename I::Bytes u[8];
  if constexpr (I::wide) {
    expand<I, B, S::fields>(block, stride, u);
    POLYBIT_UNROLL
    for (int i = 0; i < 8; ++i) {
      POLYBIT_UNROLL
      for (int m = 0; m < M; ++m) {
        auto& slot = sum[m][i * S::fields / 8 * S::copies + i % S::copies];
        slot = I::dot(slot, u[i], codes + i * M + m);
      }
    }
  } else {
    typename I::Bytes nibble[4];
    expand_nibbles<I, B, 0>(block, stride, nibble);
    spread_nibbles<I>(nibble, u);
    POLYBIT_UNROLL
    for (int m = 0; m < M; ++m) sum[m][0] = I::template dot_nibbles<(B > 4 ? 4 : 0)>(sum[m][0], u, codes + m, M);
    if constexpr (B > 4) {
      expand_nibbles<I, B, 4>(block, stride, nibble);
      spread_nibbles<I>(nibble, u);
      POLYBIT_UNROLL
      for (int m = 0; m < M; ++m) sum[m][0] = I::template dot_nibbles<0>(sum[m][0], u, codes + m, M);
    }
  }
}

// One accumulator per token: copies added, fields shifted down to where field 0 is.
template <class I, int Fields, int Copies>
POLYBIT_INLINE typename I::Ints fold(const typename I::Ints* slot) {
  typename I::Ints field[Fields];
  POLYBIT_UNROLL
  for (int f = 0; f < Fields; ++f) {
    field[f] = slot[f * Copies];
    POLYBIT_UNROLL
    for (int c = 1; c < Copies; ++c) field[f] = I::add(field[f], slot[f * Copies + c]);
  }
  typename I::Ints total = field[0];
  POLYBIT_UNROLL
  for (int f = 1; f < Fields; ++f) total = I::add(total, I::down(field[f], f * (8 / Fields)));
  return total;
}

POLYBIT_INLINE float centre(int bits) { return static_cast<float>((1 << bits) - 1) * 0.5f; }

// With D = sum of unit * p * q and S = sum of q over a chunk, the chunk adds
//   factor * activation scale * (D + shift * S),   factor = s * 2^(B-b) * r / unit,
//   shift = unit * ((c_B - z) / (2^(B-b) * r) - c_b).
// D and S are exact, and so is the bracket up to one rounding wherever r = 1.
template <class I, int Unit>
struct Affine {
  using Floats = typename I::Floats;
  const Segment& w;
  float unit_centre;
  float stored_centre;
  float uniform_factor;  // where they are the same for all groups
  float uniform_shift;
  bool uniform;

  POLYBIT_INLINE explicit Affine(const Segment& segment)
      : w(segment), unit_centre(Unit * centre(segment.width)), stored_centre(centre(segment.bits)),
        uniform_factor(segment.factors[0] * (1.0f / Unit)), uniform_shift(segment.offset * Unit - unit_centre),
        uniform(!segment.zero && !segment.ratio) {}

  POLYBIT_INLINE void at(size_t group, int part, Floats& factor, Floats& shift) const {
    const Floats scale = I::load_half(w.scale + group * kRows + part * I::rows);
    if (__builtin_expect(uniform, 1)) {
      factor = I::multiply(scale, I::set(uniform_factor));
      shift = I::set(uniform_shift);
      return;
    }
    Floats inverse;
    if (w.ratio) {
      const Floats own = I::multiply(I::lookup(w.factors, w.ratio + group * 8, part), I::set(1.0f / Unit));
      factor = I::multiply(scale, own);
      inverse = I::multiply(I::lookup(w.inverses, w.ratio + group * 8, part), I::set(float(Unit)));
    } else {
      factor = I::multiply(scale, I::set(uniform_factor));
      inverse = I::set(w.inverses[0] * Unit);
    }
    const Floats zero = w.zero ? I::load_byte(w.zero + group * kRows + part * I::rows) : I::set(w.fixed_zero);
    shift = I::fma(I::subtract(I::set(stored_centre), zero), inverse, I::set(-unit_centre));
  }
};

POLYBIT_INLINE int blocks_of(const Segment& w, int chunk) {
  return chunk + 1 < w.chunks ? w.chunk_blocks : w.last_blocks;
}

// Mixed: neighbouring segments have other widths, and all must fetch ahead by the same distance.
template <class I, int B, int M, bool Mixed>
void tile(const Segment& w, const Tokens& x, int row_block, float* out) {
  using S = Shape<I, B, M>;
  using Floats = typename I::Floats;
  const Affine<I, S::unit> affine(w);
  const size_t first_slot = static_cast<size_t>(row_block) * w.slots;
  for (int part = 0; part < kRows / I::rows; ++part) {
    float* total = out + part * I::rows;  // in memory: the registers belong to sums and codes
    const uint8_t* block = w.planes + row_block * w.row_stride + part * I::rows * 4;
    const int32_t* codes = x.codes;
    for (int chunk = 0; chunk < w.chunks; ++chunk) {
      typename I::Ints sum[M][S::slots];
      POLYBIT_UNROLL
      for (int m = 0; m < M; ++m) {
        POLYBIT_UNROLL
        for (int s = 0; s < S::slots; ++s) sum[m][s] = I::zero();
      }
      const int blocks = blocks_of(w, chunk);
      for (int k = 0; k < blocks; ++k, block += kBlockBytes, codes += 8 * M) {
        fetch_ahead<B, M, Mixed>(block, w.plane_stride);
        accumulate<I, B, M>(block, w.plane_stride, codes, sum);
      }
      const float* scale = x.scale + static_cast<size_t>(chunk) * M;
      const float* code_sum = x.sum + static_cast<size_t>(chunk) * M;
      Floats factor, shift;
      affine.at(first_slot + (chunk >> w.group_shift), part, factor, shift);
      POLYBIT_UNROLL
      for (int m = 0; m < M; ++m) {
        const Floats dot = I::to_float(fold<I, S::fields, S::copies>(sum[m]));
        const Floats centred = I::fma(shift, I::set(code_sum[m]), dot);
        const Floats before = I::load_floats(total + m * kRows);
        I::store(total + m * kRows, I::fma(I::multiply(centred, I::set(scale[m])), factor, before));
      }
    }
  }
}

template <class I, int B>
void expand_row_block(const Segment& w, int row_block, uint8_t* codes) {
  const uint8_t* block = w.planes + row_block * w.row_stride;
  for (int k = 0; k < w.blocks; ++k, block += kBlockBytes, codes += 8 * kBlockBytes) {
    typename I::Bytes u[8];
    fetch_ahead<B, 8, false>(block, w.plane_stride);
    expand<I, B, 1>(block, w.plane_stride, u);
    POLYBIT_UNROLL
    for (int i = 0; i < 8; ++i) I::store_bytes(codes + i * kBlockBytes, u[i]);
  }
}

// Two row blocks share every load of a token's codes, which the tile of one row block is short of.
template <class I, int B>
void panel(const Segment& w, const uint8_t* codes, size_t row_bytes, const Tokens& x, int row_block, float* out) {
  constexpr int M = kTileSizes[I::largest];
  using Floats = typename I::Floats;
  const Affine<I, Shape<I, B, M>::unit> affine(w);
  const size_t first_slot = static_cast<size_t>(row_block) * w.slots;
  const int32_t* words = x.codes;
  for (int chunk = 0; chunk < w.chunks; ++chunk) {
    typename I::Ints sum[kPanel][M];
    POLYBIT_UNROLL
    for (int r = 0; r < kPanel; ++r) {
      POLYBIT_UNROLL
      for (int m = 0; m < M; ++m) sum[r][m] = I::zero();
    }
    for (int i = 0, count = blocks_of(w, chunk) * 8; i < count; ++i, codes += kBlockBytes, words += M) {
      typename I::Bytes u[kPanel];
      POLYBIT_UNROLL
      for (int r = 0; r < kPanel; ++r) u[r] = I::load(codes + r * row_bytes);
      POLYBIT_UNROLL
      for (int m = 0; m < M; ++m) {
        const typename I::Ints word = I::broadcast(words[m]);
        POLYBIT_UNROLL
        for (int r = 0; r < kPanel; ++r) sum[r][m] = I::dot_words(sum[r][m], u[r], word);
      }
    }
    const float* scale = x.scale + static_cast<size_t>(chunk) * M;
    const float* code_sum = x.sum + static_cast<size_t>(chunk) * M;
    Floats factor[kPanel], shift[kPanel];
    POLYBIT_UNROLL
    for (int r = 0; r < kPanel; ++r)
      affine.at(first_slot + static_cast<size_t>(r) * w.slots + (chunk >> w.group_shift), 0, factor[r], shift[r]);
    POLYBIT_UNROLL
    for (int m = 0; m < M; ++m) {
      const Floats one_scale = I::set(scale[m]), one_sum = I::set(code_sum[m]);
      POLYBIT_UNROLL
      for (int r = 0; r < kPanel; ++r) {
        const Floats dot = I::to_float(sum[r][m]);
        const Floats centred = I::fma(shift[r], one_sum, dot);
        float* total = out + (r * M + m) * kRows;
        I::store(total, I::fma(I::multiply(centred, one_scale), factor[r], I::load_floats(total)));
      }
    }
  }
}

template <class I, int B>
void decode(const Weight& whole, const Segment& w, int row_block, const float* column_scale, float* out) {
  constexpr int unit_shift = B <= 4 ? 4 - B : 8 - B;
  const float step = static_cast<float>(1 << (w.bits - w.width));
  const int rows = whole.rows - row_block * kRows < kRows ? whole.rows - row_block * kRows : kRows;
  const uint8_t* block = w.planes + row_block * w.row_stride;
  for (int chunk = 0; chunk < w.chunks; ++chunk) {
    const size_t slot = static_cast<size_t>(row_block) * w.slots + (chunk >> w.group_shift);
    const int first = w.columns[chunk], blocks = blocks_of(w, chunk);
    for (int k = first; k < first + blocks; ++k, block += kBlockBytes) {
      alignas(64) uint8_t codes[8][kBlockBytes];
      for (int part = 0; part < kRows / I::rows; ++part) {
        typename I::Bytes u[8];
        expand<I, B, 1>(block + part * I::rows * 4, w.plane_stride, u);
        for (int i = 0; i < 8; ++i) std::memcpy(codes[i] + part * I::rows * 4, &u[i], I::rows * 4);
      }
      const int columns = whole.columns - k * kColumns < kColumns ? whole.columns - k * kColumns : kColumns;
      for (int r = 0; r < rows; ++r) {
        const uint8_t packed = w.ratio ? w.ratio[slot * 8 + r % 8] : 0;
        const float ratio_step = w.ratios[w.ratio ? (r < 8 ? packed & 15 : packed >> 4) : 0] * step;
        const float zero = w.zero ? static_cast<float>(w.zero[slot * kRows + r]) : w.fixed_zero;
        const float offset = centre(w.bits) - zero;
        const float scale = half_to_float(w.scale[slot * kRows + r]) * whole.gain;
        float value[kColumns];
        for (int j = 0; j < kColumns; ++j) {
          const float prefix = static_cast<float>(codes[j / 4][4 * r + j % 4] >> unit_shift) - centre(B);
          value[j] = scale * (ratio_step * prefix + offset);
        }
        if (column_scale)
          for (int j = 0; j < columns; ++j) value[j] *= column_scale[k * kColumns + j];
        float* row = out + static_cast<size_t>(r) * whole.columns + k * kColumns;
        std::memcpy(row, value, columns * sizeof(float));
      }
    }
  }
}

template <class I>
uint64_t read_memory(const void* memory, size_t count) {
  const uint8_t* bytes = static_cast<const uint8_t*>(memory);
  constexpr size_t step = sizeof(typename I::Bytes);
  typename I::Bytes seen[4] = {I::load(bytes), I::load(bytes), I::load(bytes), I::load(bytes)};
  for (size_t at = 0; at + 4 * step <= count; at += 4 * step) {
    POLYBIT_UNROLL
    for (int i = 0; i < 4; ++i) seen[i] = I::either(seen[i], I::load(bytes + at + i * step));
  }
  uint64_t result = 0;
  for (int i = 0; i < 4; ++i) {
    uint64_t word;
    std::memcpy(&word, &seen[i], 8);
    result ^= word;
  }
  return result;
}

template <class I, int B, int Size = 0>
void fill(Kernels& k) {
  constexpr bool apart = I::panels && kTileSizes[Size] <= 2;  // few tokens wait for memory, many do not
  k.tile[0][B][Size] = tile<I, B, kTileSizes[Size], false>;
  k.tile[1][B][Size] = tile<I, B, kTileSizes[Size], apart>;
  k.decode[B] = decode<I, B>;
  if constexpr (I::panels) {
    k.expand[B] = expand_row_block<I, B>;
    k.panel[B] = panel<I, B>;
  }
  if constexpr (Size < I::largest) fill<I, B, Size + 1>(k);
}

template <class I>
Kernels make_kernels(const char* name) {
  Kernels k{};
  k.name = name;
  k.largest = I::largest;
  fill<I, 1>(k);
  fill<I, 2>(k);
  fill<I, 3>(k);
  fill<I, 4>(k);
  fill<I, 5>(k);
  fill<I, 6>(k);
  fill<I, 7>(k);
  fill<I, 8>(k);
  k.round = round_activations;
  k.project = project<I>;
  k.lift = lift<I>;
  k.read = read_memory<I>;
  k.multiply = I::multiply_many;
  k.multiply_operations = I::multiply_operations;
  return k;
}

}  // namespace
}  // namespace polybit
