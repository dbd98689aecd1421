// The best code of a column for a vector of rows: least sum over widths of lambda_b (w_b(u) - target_b)^2.
#pragma once

#include "search_tile.h"

namespace polybit {
namespace {

constexpr int kNodes = 128;  // prefixes of the width before the widest

template <class S>
struct Choice {
  using Vec = typename S::Vec;
  using T = typename S::T;
  const Tile<S>& tile;
  int group;
  Vec step[kVectors + 1];     // [count][height]
  Vec inverse[kVectors + 1];  // of the steps
  Vec pull[kVectors + 1];     // lambda_b step_b^2
  Vec offset[kVectors];       // [height]

  Choice(const Tile<S>& from, int g) : tile(from), group(g) {
    for (int r = 0; r < tile.height; ++r) {
      offset[r] = tile.offset(g, r);
      for (int b = 0; b < tile.levels.count; ++b) {
        const int v = b * tile.height + r;
        step[v] = tile.step(g, b, r);
        inverse[v] = set<S>(1) / step[v];
        pull[v] = step[v] * step[v] * set<S>(tile.levels.emphasis[b]);
      }
    }
  }

  Vec value(int b, int r, Vec code) const {
    return tile.prefix(group, b, code) * step[b * tile.height + r] + offset[r];
  }

  // target: [count][height]; the code stays in the cell of `now` if leading bits are held
  POLYBIT_ALWAYS Vec operator()(int r, const Vec* target, Vec now, int held) const {
    Vec low = set<S>(0), high = set<S>(tile.top(group));
    if (held) {
      const T cell = T(1 << (tile.levels.bits - held));
      low = round_down<S>(now * set<S>(1 / cell)) * set<S>(cell);
      high = low + set<S>(cell - 1);
    }
    if (tile.levels.count == 1) {
      const Vec place = (target[r] - offset[r]) / step[r] + set<S>(tile.middle(group));
      return round_into<S>(place, low, high);
    }
    return joint(r, target, low, high);
  }

  // Walks the tree of prefixes from the narrowest width on; the widest has a closed form below each node.
  POLYBIT_ALWAYS Vec joint(int r, const Vec* target, Vec low, Vec high) const {
    const auto& levels = tile.levels;
    Vec node[kNodes];
    int b = levels.count - 1;
    {
      const Vec x = (target[b * tile.height + r] - offset[r]) * inverse[b * tile.height + r];
      const Vec weight = pull[b * tile.height + r];
      Vec miss = set<S>(-tile.centre[b]) - x;
      for (int p = 0; p < 1 << levels.widths[b]; ++p, miss += set<S>(1)) node[p] = weight * miss * miss;
    }
    for (--b; b > 0; --b) {
      const int extra = levels.widths[b] - levels.widths[b + 1], many = 1 << levels.widths[b];
      const Vec x = (target[b * tile.height + r] - offset[r]) * inverse[b * tile.height + r];
      const Vec weight = pull[b * tile.height + r];
      Vec miss = set<S>(T(many - 1) - tile.centre[b]) - x;
      for (int p = many - 1; p >= 0; --p, miss -= set<S>(1)) node[p] = node[p >> extra] + weight * miss * miss;
    }
    const int children = 1 << (levels.widths[0] - levels.widths[1]), parents = 1 << levels.widths[1];
    const Vec place = (target[r] - offset[r]) * inverse[r] + set<S>(tile.centre[0]), weight = pull[r];
    const Vec near = round_into<S>(place, low, high);
    Vec least = set<S>(__builtin_inff()), best = near;
    for (int p = 0; p < parents; ++p) {
      const Vec first = set<S>(T(p * children)), last = set<S>(T(p * children + children - 1));
      const Vec code = smaller(larger(near, first), last), miss = code - place;
      Vec cost = node[p] + weight * miss * miss;
      cost = (code < low) | (code > high) ? set<S>(__builtin_inff()) : cost;
      const auto better = cost < least;
      least = better ? cost : least;
      best = better ? code : best;
    }
    return best;
  }
};

}  // namespace
}  // namespace polybit
