// Cuts the columns of a stored weight into segments that are read alike.
#include "stored.h"

#include <algorithm>
#include <stdexcept>

namespace polybit {
namespace {

int blocks_up(int n, int size) { return (n + size - 1) / size; }

float middle(int bits) { return static_cast<float>((1 << bits) - 1) * 0.5f; }

}  // namespace

// A group of columns, where its part of the planes is, and where it lies in that part.
struct Reading::Group {
  int column;  // first block of columns
  int blocks;
  int slot;
  int stored;
  int read;
  int part_block;   // first block in its part
  int part_blocks;  // blocks of the part in a row block
  size_t part;      // bytes before the part
};

int count_groups(const Stored& stored) { return stored.group_size ? blocks_up(stored.columns, stored.group_size) : 1; }

Reading::Reading(const Stored& stored, const std::vector<int>& widths) { fill(stored, widths); }

Reading::Reading(const Stored& stored, int width) {
  std::vector<int> widths(count_groups(stored), width);
  for (size_t g = 0; g < stored.group_bits.size(); ++g) widths[g] = std::min(width, stored.group_bits[g]);
  fill(stored, widths);
}

void Reading::fill(const Stored& stored, const std::vector<int>& widths) {
  Weight& w = weight_;
  w.gain = stored.gain;
  w.rows = stored.rows;
  w.columns = stored.columns;
  w.row_blocks = blocks_up(stored.rows, kRows);
  w.column_blocks = blocks_up(stored.columns, kColumns);
  w.chunk_blocks = stored.group_size == 32 ? 1 : stored.group_size == 64 ? 2 : 4;
  w.chunks = blocks_up(w.column_blocks, w.chunk_blocks);
  const std::vector<Group> groups = sort_groups(stored, widths);
  columns_.reserve(w.chunks);
  for (size_t begin = 0, end; begin < groups.size(); begin = end) {
    const auto alike = [&](const Group& g) { return g.stored == groups[begin].stored && g.read == groups[begin].read; };
    for (end = begin + 1; end < groups.size() && alike(groups[end]); ++end) {}
    add_segment(stored, groups.data() + begin, groups.data() + end);
  }
  if (!stored.group_bits.empty()) {
    places_.resize(w.chunks);
    for (const Segment& s : segments_)
      for (int c = 0; c < s.chunks; ++c)  // only the last chunk of a segment may be shorter
        places_[s.columns[c] / w.chunk_blocks] = {s.first_block + c * w.chunk_blocks, s.first_chunk + c};
    w.places = places_.data();
  }
  w.segments = segments_.data();
  w.segment_count = static_cast<int>(segments_.size());
}

// Groups in the order they are stored.
std::vector<Reading::Group> Reading::sort_groups(const Stored& stored, const std::vector<int>& widths) const {
  const int count = count_groups(stored), each = stored.group_size ? stored.group_size / kColumns : weight_.column_blocks;
  if (static_cast<int>(widths.size()) != count || (!stored.group_bits.empty() && stored.group_bits.size() != widths.size()))
    throw std::invalid_argument("one width per group is needed");
  std::vector<Group> groups(count);
  for (int g = 0; g < count; ++g) {
    const int bits = stored.group_bits.empty() ? stored.bits : stored.group_bits[g];
    if (bits < 1 || bits > stored.bits || widths[g] < 1 || widths[g] > bits) throw std::invalid_argument("width out of range");
    groups[g] = {g * each, std::min(each, weight_.column_blocks - g * each), g, bits, widths[g], 0, 0, 0};
  }
  std::stable_sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) { return a.stored > b.stored; });
  size_t part = 0;
  for (size_t begin = 0, end = 0; begin < groups.size(); begin = end) {
    int blocks = 0;
    for (; end < groups.size() && groups[end].stored == groups[begin].stored; ++end) {
      groups[end].slot = static_cast<int>(end);
      groups[end].part = part;
      groups[end].part_block = blocks;
      blocks += groups[end].blocks;
    }
    for (size_t i = begin; i < end; ++i) groups[i].part_blocks = blocks;
    part += static_cast<size_t>(groups[begin].stored) * weight_.row_blocks * blocks * kBlockBytes;
  }
  return groups;
}

void Reading::add_segment(const Stored& stored, const Group* begin, const Group* end) {
  Segment s{};
  s.bits = begin->stored;
  s.width = begin->read;
  s.row_stride = static_cast<size_t>(begin->part_blocks) * kBlockBytes;
  s.planes = stored.planes + begin->part + static_cast<size_t>(begin->part_block) * kBlockBytes;
  s.plane_stride = stored.group_bits.empty() ? stored.plane_stride : s.row_stride * weight_.row_blocks;
  const size_t slot = begin->slot;
  s.scale = stored.scale + slot * kRows;
  if (stored.zero) s.zero = stored.zero + slot * kRows;
  s.fixed_zero = middle(s.bits) - (middle(stored.bits) - stored.fixed_zero);
  const Ratio whole, &ratio = s.width < s.bits ? stored.ratio[s.width] : whole;
  if (ratio.index) s.ratio = ratio.index + slot * (kRows / 2);
  for (int i = 0; i < 16; ++i) {
    s.ratios[i] = ratio.levels[i];
    // a ratio of (nearly) zero leaves the offset alone, which must survive the division
    const float r = s.ratios[i] < 1e-20f && s.ratios[i] > -1e-20f ? 1e-20f : s.ratios[i];
    s.factors[i] = static_cast<float>(1 << (s.bits - s.width)) * r;
    s.inverses[i] = 1.0f / s.factors[i];
  }
  s.offset = (middle(s.bits) - s.fixed_zero) * s.inverses[0];
  s.slots = count_groups(stored);
  s.chunk_blocks = weight_.chunk_blocks;
  s.group_shift = stored.group_size == 0 ? 31 : stored.group_size == 256 ? 1 : 0;
  if (!segments_.empty()) {
    s.first_block = segments_.back().first_block + segments_.back().blocks;
    s.first_chunk = segments_.back().first_chunk + segments_.back().chunks;
  }
  s.columns = columns_.data() + columns_.size();  // reserved whole, so that it stays where it is
  for (const Group* g = begin; g < end; ++g) {
    for (int block = 0; block < g->blocks; block += s.chunk_blocks, ++s.chunks) columns_.push_back(g->column + block);
    s.blocks += g->blocks;
  }
  s.last_blocks = (end[-1].blocks - 1) % s.chunk_blocks + 1;
  segments_.push_back(s);
}

}  // namespace polybit
