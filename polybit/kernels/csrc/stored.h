// A weight in memory, and the ways to read it.
#pragma once

#include <vector>

#include "problem.h"

namespace polybit {

// Ratios of one narrower width: sixteen levels, and an index per group or null for the first level everywhere.
struct Ratio {
  const uint8_t* index = nullptr;
  float levels[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
};

// Addresses and numbers of a stored weight; the owner of the memory outlives it. A ragged weight (`group_bits` is not
// empty) has a width per group. Its groups are sorted by width, widest first, equal widths in their order, and
// everything stored per group follows that order; the groups of one width are a part with planes of its own,
// [b][row_blocks][blocks][64], the parts one after another.
struct Stored {
  const uint8_t* planes;
  size_t plane_stride;  // of a weight that is not ragged
  int bits;             // of the widest groups
  const uint16_t* scale;
  const uint8_t* zero;
  float gain;
  float fixed_zero;  // of the widest groups; the others have the same distance from their middle
  int rows;
  int columns;
  int group_size;  // 0: one group per row
  std::vector<int> group_bits;
  Ratio ratio[9];
};

// What the kernels need to read a weight at certain widths.
class Reading {
 public:
  // `widths`: bits to read of every group in the order of the columns, at most what is stored of it.
  Reading(const Stored& stored, const std::vector<int>& widths);
  // Every group at `width`, or what is stored of it where that is less.
  Reading(const Stored& stored, int width);
  Reading(const Reading&) = delete;

  const Weight& weight() const { return weight_; }

 private:
  struct Group;
  void fill(const Stored& stored, const std::vector<int>& widths);
  std::vector<Group> sort_groups(const Stored& stored, const std::vector<int>& widths) const;
  void add_segment(const Stored& stored, const Group* begin, const Group* end);

  Weight weight_{};
  std::vector<Segment> segments_;
  std::vector<int32_t> columns_;
  std::vector<Place> places_;
};

int count_groups(const Stored& stored);

}  // namespace polybit
