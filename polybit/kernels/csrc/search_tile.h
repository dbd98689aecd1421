// A tile: a few vectors of rows of a weight, every lane a row. Written once over compiler vectors of POLYBIT_VECTOR
// bytes; every instruction set includes this file. All names have internal linkage, so that code compiled for one
// processor is never linked into another's path, and nothing of the standard library that could be.
#pragma once

#include <cstring>

#include "search.h"

#if defined(__clang__)
#define POLYBIT_FULL _Pragma("clang loop unroll(full)")
#else
#define POLYBIT_FULL _Pragma("GCC unroll 16")
#endif
#define POLYBIT_ALWAYS inline __attribute__((always_inline))

namespace polybit {
namespace {

constexpr int kBlock = 64;      // columns between two updates of everything else
constexpr int kVectors = 6;     // vectors of a tile (widths times vectors of rows) that keep the registers busy
constexpr int kDepth = 64;      // rows of the Hessian that pass the tile together: their vectors stay in the first cache

struct Single {
  using T = float;
  typedef float Vec __attribute__((vector_size(POLYBIT_VECTOR)));
  typedef int32_t Ints __attribute__((vector_size(POLYBIT_VECTOR)));
  typedef float Floats __attribute__((vector_size(POLYBIT_VECTOR)));  // as many as there are lanes
  typedef int32_t Words __attribute__((vector_size(POLYBIT_VECTOR)));
  static constexpr T whole = 12582912.0f;  // added and taken away again it rounds to an integer
};

struct Twice {
  using T = double;
  typedef double Vec __attribute__((vector_size(POLYBIT_VECTOR)));
  typedef int64_t Ints __attribute__((vector_size(POLYBIT_VECTOR)));
  typedef float Floats __attribute__((vector_size(POLYBIT_VECTOR / 2)));
  typedef int32_t Words __attribute__((vector_size(POLYBIT_VECTOR / 2)));
  static constexpr T whole = 6755399441055744.0;
};

template <class S>
constexpr int kLanes = POLYBIT_VECTOR / sizeof(typename S::T);

template <class S>
POLYBIT_ALWAYS typename S::Vec set(typename S::T x) {
  return typename S::Vec{} + x;
}

template <class V>
POLYBIT_ALWAYS V smaller(V a, V b) {
  return a < b ? a : b;
}

template <class V>
POLYBIT_ALWAYS V larger(V a, V b) {
  return a > b ? a : b;
}

// Largest integer up to x, for |x| far below the mantissa's range; what lies beyond comes back as some large number.
template <class S>
POLYBIT_ALWAYS typename S::Vec round_down(typename S::Vec x) {
  const typename S::Vec magic = set<S>(S::whole);
  const typename S::Vec near = (x + magic) - magic;
  return near - (near > x ? set<S>(1) : set<S>(0));
}

// The package's rounding (ties upwards), then kept between two integers.
template <class S>
POLYBIT_ALWAYS typename S::Vec round_into(typename S::Vec x, typename S::Vec low, typename S::Vec high) {
  // kept first, so that any x may come
  return round_down<S>(smaller(larger(x + set<S>(typename S::T(0.5)), low), high));
}

template <class Ints>
POLYBIT_ALWAYS bool any(const Ints& mask) {
  uint64_t words[sizeof(Ints) / 8], seen = 0;
  std::memcpy(words, &mask, sizeof mask);
  for (uint64_t word : words) seen |= word;
  return seen != 0;
}

// Rounded to a binary16 times `gain`, a power of two; never zero.
template <class S>
POLYBIT_ALWAYS typename S::Vec half_scale(typename S::Vec x, typename S::T gain) {
  using Floats = typename S::Floats;
  using Words = typename S::Words;
  const Floats y = __builtin_convertvector(x / set<S>(gain), Floats);
  Floats size = y < 0 ? -y : y;
  size = size < 65504.0f ? size : Floats{} + 65504.0f;
  Words bits;
  std::memcpy(&bits, &size, sizeof bits);
  bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF;
  Floats normal;
  std::memcpy(&normal, &bits, sizeof normal);
  const Floats small = (size + 0.5f) - 0.5f;  // below 2^-14 the steps are 2^-24 wide
  const Floats least = Floats{} + 5.9604644775390625e-8f;
  Floats half = size < 6.103515625e-5f ? small : normal;
  half = half == 0 ? least : (y < 0 ? -half : half);
  return __builtin_convertvector(half, typename S::Vec) * set<S>(gain);
}

// What a tile of `height` vectors of rows holds of the code levels: one vector per group (and width) of each.
template <class S>
struct Tile {
  using Vec = typename S::Vec;
  using T = typename S::T;
  const CodeLevels<T>& levels;
  int first;   // row
  int height;  // vectors of rows
  int vectors;  // height times widths
  Vec* scale;   // [groups][height]
  Vec* zero;    // [groups][height]
  Vec* ratio;   // [groups][count][height]
  T stride[kMostWidths];   // 2^(B-b)
  T centre[kMostWidths];   // of the codes of width b

  Tile(const CodeLevels<T>& from, int first_row, int height_, Vec*& room) : levels(from), first(first_row), height(height_) {
    vectors = height * levels.count;
    scale = take(room, levels.groups * height);
    zero = take(room, levels.groups * height);
    ratio = take(room, levels.groups * vectors);
    for (int b = 0; b < levels.count; ++b) {
      stride[b] = T(1 << (levels.bits - levels.widths[b]));
      centre[b] = T((1 << levels.widths[b]) - 1) / 2;
    }
    for (int g = 0; g < levels.groups; ++g)
      for (int r = 0; r < height; ++r) {
        for (int lane = 0; lane < kLanes<S>; ++lane) {
          const size_t at = static_cast<size_t>(row(r, lane)) * levels.groups + g;
          scale[g * height + r][lane] = levels.scale[at];
          zero[g * height + r][lane] = levels.zero[at];
          for (int b = 0; b < levels.count; ++b)
            ratio[g * vectors + b * height + r][lane] = levels.ratio[b * plane() + at];
        }
      }
  }

  static size_t room(const CodeLevels<T>& levels, int height) {
    return static_cast<size_t>(levels.groups) * height * (2 + levels.count);
  }

  static Vec* take(Vec*& room, size_t count) {
    Vec* taken = room;
    room += count;
    return taken;
  }

  size_t plane() const { return static_cast<size_t>(levels.rows) * levels.groups; }

  // rows beyond the last one are the last one again
  int row(int r, int lane) const {
    const int wanted = first + r * kLanes<S> + lane;
    return wanted < levels.rows ? wanted : levels.rows - 1;
  }

  int rows() const {
    const int wanted = height * kLanes<S>;
    return first + wanted < levels.rows ? wanted : levels.rows - first;
  }

  int start(int g) const { return g * levels.group_size; }
  int stop(int g) const {
    const int end = (g + 1) * levels.group_size;
    return end < levels.columns ? end : levels.columns;
  }
  int bits(int g) const { return levels.group_bits ? levels.group_bits[g] : levels.bits; }
  T top(int g) const { return T((1 << bits(g)) - 1); }
  T middle(int g) const { return top(g) / 2; }
  // centre of the prefixes of width b in a group
  T middle_of(int g, int b) const { return levels.group_bits ? middle(g) : centre[b]; }

  Vec step(int g, int b, int r) const {
    return scale[g * height + r] * ratio[g * vectors + b * height + r] * set<S>(stride[b]);
  }
  Vec offset(int g, int r) const { return scale[g * height + r] * (set<S>(middle(g)) - zero[g * height + r]); }

  // p_b - c_b of codes
  Vec prefix(int g, int b, Vec code) const {
    if (stride[b] == 1) return code - set<S>(middle_of(g, b));  // the code itself
    return round_down<S>(code * set<S>(1 / stride[b])) - set<S>(centre[b]);
  }

  void write_back() const {
    for (int r = 0; r < height; ++r)
      for (int lane = 0; lane < kLanes<S>; ++lane) {
        const int index = r * kLanes<S> + lane;
        if (index >= rows()) return;
        for (int g = 0; g < levels.groups; ++g) {
          const size_t at = static_cast<size_t>(first + index) * levels.groups + g;
          levels.scale[at] = scale[g * height + r][lane];
          levels.zero[at] = zero[g * height + r][lane];
          for (int b = 0; b < levels.count; ++b)
            levels.ratio[b * plane() + at] = ratio[g * vectors + b * height + r][lane];
        }
      }
  }
};

inline int padded(int columns) { return (columns + kPanelColumns - 1) / kPanelColumns * kPanelColumns; }

template <class S, int V, int N>
POLYBIT_ALWAYS void product_columns(typename S::Vec* to, const typename S::Vec* moved, const int32_t* active, int count,
                                    const typename S::T* panel) {
  typename S::Vec sum[N][V];
  POLYBIT_FULL
  for (int j = 0; j < N; ++j) {
    POLYBIT_FULL
    for (int v = 0; v < V; ++v) sum[j][v] = to[j * V + v];
  }
  for (int n = 0; n < count; ++n) {
    const int k = active[n];
    const typename S::Vec* row = moved + static_cast<size_t>(k) * V;
    const typename S::T* h = panel + static_cast<size_t>(k) * kPanelColumns;
    POLYBIT_FULL
    for (int v = 0; v < V; ++v) {
      POLYBIT_FULL
      for (int j = 0; j < N; ++j) sum[j][v] += row[v] * h[j];
    }
  }
  POLYBIT_FULL
  for (int j = 0; j < N; ++j) {
    POLYBIT_FULL
    for (int v = 0; v < V; ++v) to[j * V + v] = sum[j][v];
  }
}

template <class S, int V>
void product(typename S::Vec* to, int from, int end, const typename S::Vec* moved, int first, const int32_t* active,
             int count, const typename S::T* packed, int columns) {
  constexpr int N = V * 4 + 5 <= POLYBIT_REGISTERS ? 4 : V * 2 + 3 <= POLYBIT_REGISTERS ? 2 : 1;
  for (int done = 0; done < count; done += kDepth) {
    const int depth = count - done < kDepth ? count - done : kDepth;
    for (int i = from; i < end; i += N) {
      const typename S::T* panel = packed + static_cast<size_t>(i / kPanelColumns) * columns * kPanelColumns;
      product_columns<S, V, N>(to + static_cast<size_t>(i) * V, moved, active + done, depth,
                               panel + static_cast<size_t>(first) * kPanelColumns + i % kPanelColumns);
    }
  }
}

// to[i][v] += sum over active k of moved[k][v] H[first + k][i], for the columns i from `from` to `end`; the first of
// them is a multiple of four, and what lies between the last one and the next such multiple is padding.
template <class S>
void push(int vectors, typename S::Vec* to, int from, int end, const typename S::Vec* moved, int first,
          const int32_t* active, int count, const typename S::T* packed, int columns) {
  if (!count || from >= end) return;
  const int last = padded(end);
  switch (vectors) {
    case 1: return product<S, 1>(to, from, last, moved, first, active, count, packed, columns);
    case 2: return product<S, 2>(to, from, last, moved, first, active, count, packed, columns);
    case 3: return product<S, 3>(to, from, last, moved, first, active, count, packed, columns);
    case 4: return product<S, 4>(to, from, last, moved, first, active, count, packed, columns);
    case 5: return product<S, 5>(to, from, last, moved, first, active, count, packed, columns);
    case 6: return product<S, 6>(to, from, last, moved, first, active, count, packed, columns);
    default: return product<S, 7>(to, from, last, moved, first, active, count, packed, columns);
  }
}

// The places of the vectors that are not zero in any lane.
template <class S>
int find_active(const typename S::Vec* moved, int vectors, int count, int32_t* active) {
  int found = 0;
  for (int k = 0; k < count; ++k) {
    typename S::Ints seen = {};
    for (int v = 0; v < vectors; ++v) seen |= moved[static_cast<size_t>(k) * vectors + v] != 0;
    if (any(seen)) active[found++] = k;
  }
  return found;
}

inline int tile_height(int count, int rows, int lanes) {
  const int most = kVectors / count > 1 ? kVectors / count : 1, needed = (rows + lanes - 1) / lanes;
  return needed < most ? needed : most;
}

}  // namespace
}  // namespace polybit
