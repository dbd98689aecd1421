// What the search for codes is given: a weight in working units, its Hessian, and what codes mean at every width.
#pragma once

#include <cstddef>
#include <cstdint>

namespace polybit {

constexpr int kMostWidths = 7;    // 8 to 2 bits
constexpr int kPanelColumns = 4;  // columns of the Hessian that are kept side by side: a packed matrix is [n / 4 rounded up][n][4]
constexpr int kTable = 16;        // stored ratios of a width

// The values of codes at every width b, w_b = s (2^(B-b) r_b (p_b - c_b) + c_B - z), p_b the b leading bits.
template <class T>
struct CodeLevels {
  int rows;
  int columns;
  int group_size;  // columns of a group; the last one may be shorter
  int groups;
  int bits;                  // B
  int count;                 // of widths
  int widths[kMostWidths];   // widest first; where codes are chosen the first one is B
  T emphasis[kMostWidths];   // how much a squared error at each width counts
  T* scale;                  // [rows][groups]
  T* zero;                   // [rows][groups]
  T* ratio;                  // [count][rows][groups]
  const int32_t* group_bits;  // [groups], a width per group (then count = 1 and ratio = 1), or null
};

// Error compensation: every column is rounded in turn and its error moved to the columns not yet rounded.
template <class T>
struct Compensation {
  CodeLevels<T> levels;
  const T* weight;       // [rows][columns], columns in the order in which they are rounded
  const T* factor;       // upper Cholesky factor of the inverse Hessian in that order, packed
  const T* diagonal;     // its diagonal
  const int32_t* group;  // [columns], group of each column in that order
  uint8_t* codes;        // [rows][columns] in that order
  T* loss;               // [count][rows], tr(E H E^T) of each row, which the errors moved add up to
};

// Coordinate descent on sum_b emphasis_b tr(E_b H E_b^T), with scales, zero points and ratios fitted on the way.
template <class T>
struct Descent {
  CodeLevels<T> levels;  // the fitted numbers are written back
  const T* weight;       // [rows][columns], or null: `gradient` holds E_b H of the codes already
  const T* hessian;      // packed
  const T* diagonal;     // its diagonal
  const T* sums;         // [columns], sum of the Hessian over the rows of the column's own group
  uint8_t* codes;        // [rows][columns], in and out
  T* gradient;           // [count][rows][columns], E_b H at the end
  int sweeps;
  bool fit;              // scales are free
  bool zero;             // zero points are free too
  T gain;                // scales are binary16 times this
  const T* tables[kMostWidths];  // sixteen ratios a width may take, or null where its ratio is held
  int held;              // leading bits of a code that stay as they are
};

// Least squared error of nearest codes over clipping ranges, group by group.
template <class T>
struct ScaleSearch {
  enum Kind { centre, level, group };
  int rows;
  int columns;
  int group_size;
  int groups;
  const T* weight;        // [rows][columns]
  const T* importance;    // [columns]
  const int32_t* bits;    // [groups]
  Kind kind;              // of zero point
  T gain;
  const T* shrinks;       // [2][points]: of ranges below 4 bits, and of the others
  int points;
  int refine;             // steps that fit the scale to its codes
  T* scale;               // [rows][groups], out
  T* zero;                // [rows][groups], out
};

// The same for slices of codes: least sum over widths of relative errors, over clipping ranges and tilts.
template <class T>
struct SliceSearch {
  CodeLevels<T> levels;  // scale, zero point and ratios, out; emphasis: of the relative errors
  const T* weight;
  const T* importance;
  const T* alone;    // [count][rows][groups], scale of each width found for it alone
  bool zero;         // zero points are free
  T fixed_zero;      // else this one
  T gain;
  const T* shrinks;
  int shrink_count;
  const T* tilts;
  int tilt_count;
};

// One instruction set. Everything works on a tile of rows from `first_row` on, in `scratch` of so many numbers.
template <class T>
struct SearchKernels {
  const char* name;
  int lanes;
  int (*tile_rows)(int count, int rows);
  size_t (*compensate_scratch)(const Compensation<T>&);
  void (*compensate)(const Compensation<T>&, int first_row, T* scratch);
  size_t (*descend_scratch)(const Descent<T>&);
  void (*descend)(const Descent<T>&, int first_row, T* scratch);
  size_t (*scales_scratch)(const ScaleSearch<T>&);
  void (*scales)(const ScaleSearch<T>&, int first_row, T* scratch);
  size_t (*slices_scratch)(const SliceSearch<T>&);
  void (*slices)(const SliceSearch<T>&, int first_row, T* scratch);
};

struct SearchSet {
  SearchKernels<float> single;
  SearchKernels<double> twice;
};

// Null where the compiler could not build the set or this processor cannot run it.
const SearchSet* avx512_search();
const SearchSet* avx2_search();
const SearchSet* portable_search();

}  // namespace polybit
