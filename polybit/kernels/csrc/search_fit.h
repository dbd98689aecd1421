// Least-squares scale, zero point and ratios of one group with its codes fixed, under the Hessian, as they are stored.
#pragma once

#include "search_tile.h"

namespace polybit {
namespace {

// The cost of a group as a function of its scale s, o = c_B - z and ratios r_b, up to a constant:
// sum_b lambda_b [ s^2 (r^2 a + 2 r o c + o^2 d) - 2 s (r p + o q) ], for one vector of rows.
template <class S>
struct Quadratic {
  using Vec = typename S::Vec;
  using T = typename S::T;
  int count;
  const T* emphasis;
  T d;
  Vec a[kMostWidths], c[kMostWidths], p[kMostWidths], q[kMostWidths];

  Vec square(int b, Vec o, const Vec* r) const { return r[b] * r[b] * a[b] + set<S>(2) * r[b] * o * c[b] + o * o * set<S>(d); }

  Vec cost(Vec s, Vec o, const Vec* r) const {
    Vec sum = {};
    for (int b = 0; b < count; ++b)
      sum += set<S>(emphasis[b]) * (s * s * square(b, o, r) - set<S>(2) * s * (r[b] * p[b] + o * q[b]));
    return sum;
  }

  // `otherwise` where every value is 0 whatever the scale
  Vec scale(Vec o, const Vec* r, Vec otherwise) const {
    Vec above = {}, below = {};
    for (int b = 0; b < count; ++b) {
      above += set<S>(emphasis[b]) * (r[b] * p[b] + o * q[b]);
      below += set<S>(emphasis[b]) * square(b, o, r);
    }
    const Vec best = above / below;
    return (finite(best) & (best != 0)) ? best : otherwise;
  }

  // best o when the scale is free too; `otherwise` where the two cannot be told apart
  Vec offset(const Vec* r, Vec otherwise) const {
    Vec vv = {}, v1 = {}, wv = {}, w1 = {};
    T all = 0;
    for (int b = 0; b < count; ++b) {
      const Vec weight = set<S>(emphasis[b]);
      vv += weight * r[b] * r[b] * a[b];
      v1 += weight * r[b] * c[b];
      wv += weight * r[b] * p[b];
      w1 += weight * q[b];
      all += emphasis[b];
    }
    const Vec best = (vv * w1 - v1 * wv) / (set<S>(d * all) * wv - v1 * w1);
    return finite(best) ? best : otherwise;
  }

  static auto finite(Vec x) { return x - x == 0; }
};

template <class S>
typename S::Vec nearest_ratio(typename S::Vec wanted, const typename S::T* table) {
  using Vec = typename S::Vec;
  const auto distance = [&](int k) {
    const Vec away = wanted - set<S>(table[k]);
    return away < 0 ? -away : away;
  };
  Vec best = set<S>(table[0]), least = distance(0);
  for (int k = 1; k < kTable; ++k) {
    const Vec now = distance(k);
    best = now < least ? set<S>(table[k]) : best;
    least = now < least ? now : least;
  }
  return best;
}

// What is tried, the best of it so far, and what that costs.
template <class S>
struct Proposals {
  using Vec = typename S::Vec;
  const Quadratic<S>& quadratic;
  Vec scale, offset, ratio[kMostWidths], least;

  void consider(Vec s, Vec o, const Vec* r) {
    const Vec cost = quadratic.cost(s, o, r);
    const auto better = cost < least;
    least = better ? cost : least;
    scale = better ? s : scale;
    offset = better ? o : offset;
    for (int b = 0; b < quadratic.count; ++b) ratio[b] = better ? r[b] : ratio[b];
  }
};

template <class S>
void try_all(const Descent<typename S::T>& d, const Tile<S>& tile, int g, Proposals<S>& best) {
  using Vec = typename S::Vec;
  using T = typename S::T;
  const auto& quadratic = best.quadratic;
  const int count = quadratic.count;
  const Vec scale = best.scale, middle = set<S>(tile.middle(g)), top = set<S>(tile.top(g));
  Vec start[kMostWidths], offsets[4] = {best.offset, {}, {}, {}};
  bool tables = false;
  for (int b = 0; b < count; ++b) {
    start[b] = best.ratio[b];
    tables = tables || d.tables[b];
  }
  if (d.zero) {
    const Vec near = round_into<S>(middle - quadratic.offset(start, best.offset), set<S>(0), top);
    const T shifts[3] = {0, -1, 1};
    for (int n = 0; n < 3; ++n) offsets[n + 1] = middle - smaller(larger(near + set<S>(shifts[n]), set<S>(0)), top);
  }
  for (int n = 0; n < (d.zero ? 4 : 1); ++n) {
    const Vec o = offsets[n];
    Vec r[kMostWidths];
    for (int b = 0; b < count; ++b) r[b] = start[b];
    Vec s = half_scale<S>(quadratic.scale(o, r, scale), d.gain);
    best.consider(s, o, r);
    for (int again = 0; again < (tables ? 2 : 0); ++again) {
      for (int b = 0; b < count; ++b)
        if (d.tables[b])
          r[b] = nearest_ratio<S>((quadratic.p[b] / s - o * quadratic.c[b]) / quadratic.a[b], d.tables[b]);
      s = half_scale<S>(quadratic.scale(o, r, scale), d.gain);
      best.consider(s, o, r);
    }
  }
}

// Gives one group the best storable scale (zero point, ratios) for its codes; whether anything changed. The present
// values are among the candidates, so the cost cannot rise. codes, gradient: of the group's columns; room: for two
// vectors per code and width.
template <class S>
bool fit_group(const Descent<typename S::T>& d, const Tile<S>& tile, int g, const typename S::Vec* codes,
               const typename S::Vec* gradient, typename S::Vec* room, int32_t* active) {
  using Vec = typename S::Vec;
  const auto& levels = tile.levels;
  const int from = tile.start(g), end = tile.stop(g), height = tile.height, vectors = tile.vectors;
  Vec* prefix = room;
  Vec* pushed = room + static_cast<size_t>(padded(end - from)) * vectors;
  for (int i = 0; i < end - from; ++i) {
    active[i] = i;
    for (int b = 0; b < levels.count; ++b)
      for (int r = 0; r < height; ++r)
        prefix[i * vectors + b * height + r] = tile.prefix(g, b, codes[i * height + r]) * set<S>(tile.stride[b]);
  }
  std::memset(static_cast<void*>(pushed), 0, sizeof(Vec) * vectors * padded(end - from));
  push<S>(vectors, pushed - static_cast<ptrdiff_t>(from) * vectors, from, end, prefix, from, active, end - from, d.hessian,
          levels.columns);
  typename S::Ints changed = {};
  for (int r = 0; r < height; ++r) {
    const int at = g * height + r;
    Quadratic<S> quadratic;
    quadratic.count = levels.count;
    quadratic.emphasis = levels.emphasis;
    quadratic.d = 0;
    for (int i = from; i < end; ++i) quadratic.d += d.sums[i];
    const Vec scale = tile.scale[at], offset = set<S>(tile.middle(g)) - tile.zero[at];
    for (int b = 0; b < levels.count; ++b) {
      const int v = b * height + r;
      const Vec ratio = tile.ratio[g * vectors + v];
      Vec a = {}, c = {}, p = {}, q = {};
      for (int i = 0; i < end - from; ++i) {
        const Vec one = prefix[i * vectors + v], far = pushed[i * vectors + v];
        const Vec wanted = scale * (ratio * far + offset * set<S>(d.sums[from + i])) - gradient[i * vectors + v];
        a += one * far;
        c += far;
        p += one * wanted;
        q += wanted;
      }
      quadratic.a[b] = a, quadratic.c[b] = c, quadratic.p[b] = p, quadratic.q[b] = q;
    }
    Proposals<S> best{quadratic, scale, offset, {}, {}};
    for (int b = 0; b < levels.count; ++b) best.ratio[b] = tile.ratio[g * vectors + b * height + r];
    best.least = quadratic.cost(best.scale, best.offset, best.ratio);
    try_all<S>(d, tile, g, best);
    changed |= (best.scale != scale) | (best.offset != offset);
    tile.scale[at] = best.scale;
    tile.zero[at] = set<S>(tile.middle(g)) - best.offset;
    for (int b = 0; b < levels.count; ++b) {
      Vec& ratio = tile.ratio[g * vectors + b * height + r];
      changed |= best.ratio[b] != ratio;
      ratio = best.ratio[b];
    }
  }
  return any(changed);
}

}  // namespace
}  // namespace polybit
