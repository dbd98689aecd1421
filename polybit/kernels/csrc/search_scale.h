// Clip searches: the scale and zero point every quantizer starts from, for one width and for slices of nested codes.
#pragma once

#include "search_walk.h"

namespace polybit {
namespace {

// One group of a vector of rows, and the weight of each of its columns.
template <class S>
struct Group {
  using Vec = typename S::Vec;
  using T = typename S::T;
  const T* importance;
  int length;
  Vec* weight;  // [length]
  Vec low, high;

  // padding: the group is short, and what is missing counts as zeros
  void read(const T* from, int rows, int columns, int first_row, int start, bool padding) {
    low = set<S>(padding ? T(0) : T(__builtin_inff()));
    high = set<S>(padding ? T(0) : -T(__builtin_inff()));
    for (int i = 0; i < length; ++i) {
      for (int lane = 0; lane < kLanes<S>; ++lane) {
        const int row = first_row + lane < rows ? first_row + lane : rows - 1;
        weight[i][lane] = from[static_cast<size_t>(row) * columns + start + i];
      }
      low = smaller(low, weight[i]);
      high = larger(high, weight[i]);
    }
  }

  Vec code(int i, Vec scale, Vec zero, Vec top) const { return round_into<S>(weight[i] / scale + zero, Vec{}, top); }
};

template <class S>
struct Clip {
  using Vec = typename S::Vec;
  using T = typename S::T;
  const ScaleSearch<T>& search;
  const Group<S>& group;
  T top, centre, middle;
  Vec scale, zero, least;

  void consider(Vec tried, Vec point) {
    Vec sum = {};
    const Vec most = set<S>(top);
    for (int i = 0; i < group.length; ++i) {
      const Vec miss = (group.code(i, tried, point, most) - point) * tried - group.weight[i];
      sum += miss * miss * set<S>(group.importance[i]);
    }
    const auto better = sum < least;
    least = better ? sum : least;
    scale = better ? tried : scale;
    zero = better ? point : zero;
  }

  // codes spread over [low, high] times |shrink|; a negative shrink flips them
  void spread(Vec low, Vec high, T shrink) {
    using Kind = ScaleSearch<T>;
    Vec tried;
    if (search.kind == Kind::group) {
      tried = half_scale<S>((high - low) * set<S>(shrink / top), search.gain);
      return consider(tried, round_into<S>(-low * set<S>(shrink) / tried, Vec{}, set<S>(top)));
    }
    if (search.kind == Kind::centre) {
      tried = high * set<S>(shrink / centre);
    } else {
      // one bit has no level above zero: the other sign is had by a negative shrink
      const Vec above = top > middle ? high / set<S>(top - middle) : Vec{};
      tried = larger(-low / set<S>(middle), above) * set<S>(shrink);
    }
    consider(half_scale<S>(tried, search.gain), set<S>(middle));
  }

  void fit(T shift) {
    const Vec most = set<S>(top);
    const Vec point = search.kind == ScaleSearch<T>::group ? smaller(larger(zero + set<S>(shift), Vec{}), most) : zero;
    Vec above = {}, below = {};
    for (int i = 0; i < group.length; ++i) {
      const Vec level = group.code(i, scale, point, most) - point, weight = set<S>(group.importance[i]);
      above += level * group.weight[i] * weight;
      below += level * level * weight;
    }
    const Vec fitted = above / below;
    consider(half_scale<S>(fitted - fitted == 0 ? fitted : scale, search.gain), point);
  }

  void run(int points_of) {
    using Kind = ScaleSearch<T>;
    Vec low = smaller(group.low, Vec{}), high = larger(group.high, Vec{});
    if (search.kind == Kind::centre) {
      high = larger(-low, high);
      low = -high;
    }
    for (int n = 0; n < search.points; ++n) {
      const T shrink = search.shrinks[points_of * search.points + n];
      spread(low, high, shrink);
      if (search.kind == Kind::level) spread(-high, -low, -shrink);
    }
    for (int n = 0; n < search.refine; ++n) {
      fit(0);
      if (search.kind != Kind::group) continue;
      fit(-1);
      fit(1);
    }
  }
};

template <class S>
size_t scales_scratch(const ScaleSearch<typename S::T>& s) {
  return numbers<S>(s.group_size < s.columns ? s.group_size : s.columns);
}

template <class S>
void scales(const ScaleSearch<typename S::T>& s, int first_row, typename S::T* scratch) {
  using T = typename S::T;
  using Vec = typename S::Vec;
  for (int g = 0; g < s.groups; ++g) {
    const int start = g * s.group_size, left = s.columns - start, length = left < s.group_size ? left : s.group_size;
    Group<S> group{s.importance + start, length, aligned<S>(scratch), {}, {}};
    group.read(s.weight, s.rows, s.columns, first_row, start, false);
    const int bits = s.bits[g];
    const T top = T((1 << bits) - 1), middle = s.kind == ScaleSearch<T>::level ? T(1 << (bits - 1)) : top / 2;
    Clip<S> clip{s, group, top, top / 2, middle, set<S>(1), Vec{}, set<S>(T(__builtin_inff()))};
    clip.run(bits < 4 ? 0 : 1);
    for (int lane = 0; lane < kLanes<S> && first_row + lane < s.rows; ++lane) {
      const size_t at = static_cast<size_t>(first_row + lane) * s.groups + g;
      s.scale[at] = clip.scale[lane];
      s.zero[at] = clip.zero[lane];
    }
  }
}

// Errors of slices of the nearest codes at one scale and zero point.
template <class S>
struct Slices {
  using Vec = typename S::Vec;
  using T = typename S::T;
  const SliceSearch<T>& search;
  const Group<S>& group;
  Vec* code;  // [length]
  Vec scale, zero, least, ratio[kMostWidths], limit[kMostWidths];

  static T centre(int bits) { return T((1 << bits) - 1) / 2; }

  // what scales found for each width alone lose, the measure of the others
  void judge_alone(int first_row, int g) {
    const auto& levels = search.levels;
    for (int b = 0; b < levels.count; ++b) {
      Vec alone, sum = {};
      for (int lane = 0; lane < kLanes<S>; ++lane) {
        const int row = first_row + lane < levels.rows ? first_row + lane : levels.rows - 1;
        alone[lane] = search.alone[(static_cast<size_t>(b) * levels.rows + row) * levels.groups + g];
      }
      const T middle = centre(levels.widths[b]);
      for (int i = 0; i < group.length; ++i) {
        const Vec miss = (group.code(i, alone, set<S>(middle), set<S>(2 * middle)) - set<S>(middle)) * alone - group.weight[i];
        sum += miss * miss * set<S>(group.importance[i]);
      }
      limit[b] = set<S>(levels.emphasis[b]) / larger(sum, set<S>(T(1e-30)));
    }
  }

  void consider(Vec tried, Vec point) {
    const auto& levels = search.levels;
    const T middle = centre(levels.bits);
    const Vec shift = (set<S>(middle) - point) * tried;
    for (int i = 0; i < group.length; ++i) code[i] = group.code(i, tried, point, set<S>(2 * middle));
    Vec total = {}, found[kMostWidths];
    for (int b = 0; b < levels.count; ++b) {
      const T stride = T(1 << (levels.bits - levels.widths[b]));
      const Vec step = tried * set<S>(stride), half = set<S>(centre(levels.widths[b]));
      const auto level = [&](int i) {
        return ((b ? round_down<S>(code[i] * set<S>(1 / stride)) : code[i]) - half) * step;
      };
      found[b] = set<S>(1);
      if (b) {
        Vec above = {}, below = {};
        for (int i = 0; i < group.length; ++i) {
          const Vec one = level(i), pull = one * set<S>(group.importance[i]);
          above += pull * (group.weight[i] - shift);
          below += pull * one;
        }
        const Vec fitted = above / below;
        found[b] = smaller(larger(fitted - fitted == 0 ? fitted : set<S>(1), set<S>(T(0.4))), set<S>(T(1.6)));
      }
      Vec sum = {};
      for (int i = 0; i < group.length; ++i) {
        const Vec miss = level(i) * found[b] - (group.weight[i] - shift);
        sum += miss * miss * set<S>(group.importance[i]);
      }
      total += sum * limit[b];
    }
    const auto better = total < least;
    least = better ? total : least;
    scale = better ? tried : scale;
    zero = better ? point : zero;
    for (int b = 0; b < levels.count; ++b) ratio[b] = better ? found[b] : ratio[b];
  }

  void run() {
    const T half = centre(search.levels.bits);
    const Vec middle = (group.high + group.low) / set<S>(2), reach = (group.high - group.low) / set<S>(2);
    const Vec away = middle < 0 ? -middle : middle;
    for (int m = 0; m < search.tilt_count; ++m)
      for (int n = 0; n < search.shrink_count; ++n) {
        const T tilt = search.tilts[m];
        const Vec range = (reach + set<S>(1 - tilt) * away) * set<S>(search.shrinks[n]);
        const Vec tried = half_scale<S>(range / set<S>(half), search.gain);
        const Vec point = search.zero ? round_into<S>(set<S>(half) - set<S>(tilt) * middle / tried, Vec{}, set<S>(2 * half))
                                      : set<S>(search.fixed_zero);
        consider(tried, point);
      }
  }
};

template <class S>
size_t slices_scratch(const SliceSearch<typename S::T>& s) {
  return numbers<S>(2 * (s.levels.group_size < s.levels.columns ? s.levels.group_size : s.levels.columns));
}

template <class S>
void slices(const SliceSearch<typename S::T>& s, int first_row, typename S::T* scratch) {
  using T = typename S::T;
  using Vec = typename S::Vec;
  const auto& levels = s.levels;
  for (int g = 0; g < levels.groups; ++g) {
    const int start = g * levels.group_size, left = levels.columns - start;
    const int length = left < levels.group_size ? left : levels.group_size;
    Vec* room = aligned<S>(scratch);
    Group<S> group{s.importance + start, length, room, {}, {}};
    group.read(s.weight, levels.rows, levels.columns, first_row, start, left < levels.group_size);
    Slices<S> best{s, group, room + length, set<S>(1), Vec{}, set<S>(T(__builtin_inff())), {}, {}};
    for (int b = 0; b < levels.count; ++b) best.ratio[b] = set<S>(1);
    best.judge_alone(first_row, g);
    best.run();
    for (int lane = 0; lane < kLanes<S> && first_row + lane < levels.rows; ++lane) {
      const size_t at = static_cast<size_t>(first_row + lane) * levels.groups + g;
      levels.scale[at] = best.scale[lane];
      levels.zero[at] = best.zero[lane];
      for (int b = 0; b < levels.count; ++b)
        levels.ratio[static_cast<size_t>(b) * levels.rows * levels.groups + at] = best.ratio[b][lane];
    }
  }
}

template <class S>
int tile_rows(int count, int rows) {
  return tile_height(count, rows, kLanes<S>) * kLanes<S>;
}

template <class S>
SearchKernels<typename S::T> make_search(const char* name) {
  return {name, kLanes<S>, tile_rows<S>, compensate_scratch<S>, compensate<S>, descend_scratch<S>, descend<S>,
          scales_scratch<S>, scales<S>, slices_scratch<S>, slices<S>};
}

}  // namespace
}  // namespace polybit
