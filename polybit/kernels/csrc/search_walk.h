// The two walks over columns: error compensation, and coordinate descent with refitted scales.
#pragma once

#include "search_choice.h"
#include "search_fit.h"

namespace polybit {
namespace {

template <class S>
typename S::Vec* aligned(typename S::T* scratch) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(scratch), size = POLYBIT_VECTOR;
  return reinterpret_cast<typename S::Vec*>((at + size - 1) / size * size);
}

// Numbers of scratch for so many vectors.
template <class S>
size_t numbers(size_t vectors) {
  return (vectors + 1) * kLanes<S>;
}

inline size_t places(int count, int lane_bytes) { return (static_cast<size_t>(count) * 4 + lane_bytes - 1) / lane_bytes; }

template <class S>
int height_of(const CodeLevels<typename S::T>& levels) {
  return tile_height(levels.count, levels.rows, kLanes<S>);
}

template <class S>
size_t compensate_scratch(const Compensation<typename S::T>& c) {
  const int height = height_of<S>(c.levels), vectors = height * c.levels.count;
  return numbers<S>(Tile<S>::room(c.levels, height) + static_cast<size_t>(padded(c.levels.columns)) * vectors +
                    (kBlock + 1) * vectors + places(kBlock, POLYBIT_VECTOR));
}

// Column j of the block that begins at `start`: `error` holds what the columns of the block before it missed.
template <class S>
POLYBIT_ALWAYS void compensate_column(const Compensation<typename S::T>& c, const Tile<S>& tile, const Choice<S>& choice,
                                      int start, int j, typename S::Vec* working, typename S::Vec* error) {
  using Vec = typename S::Vec;
  const int columns = c.levels.columns, vectors = tile.vectors, height = tile.height;
  Vec* target = working + static_cast<size_t>(j) * vectors;
  Vec* missed = error + (j - start) * vectors;
  const typename S::T* factor = c.factor + static_cast<size_t>(j / kPanelColumns) * columns * kPanelColumns +
                                static_cast<size_t>(start) * kPanelColumns + j % kPanelColumns;
  for (int v = 0; v < vectors; ++v) {
    Vec sum = target[v];
    for (int k = 0; k < j - start; ++k) sum += error[k * vectors + v] * factor[k * kPanelColumns];
    target[v] = sum;
  }
  for (int r = 0; r < height; ++r) {
    const Vec code = choice(r, target, Vec{}, 0);
    for (int b = 0; b < c.levels.count; ++b) {
      const int v = b * height + r;
      missed[v] = (choice.value(b, r, code) - target[v]) / set<S>(c.diagonal[j]);
    }
    for (int lane = 0; lane < kLanes<S>; ++lane) {
      const int row = tile.first + r * kLanes<S> + lane;
      if (row < c.levels.rows) c.codes[static_cast<size_t>(row) * columns + j] = static_cast<uint8_t>(code[lane]);
    }
  }
}

template <class S>
void compensate(const Compensation<typename S::T>& c, int first_row, typename S::T* scratch) {
  using Vec = typename S::Vec;
  const auto& levels = c.levels;
  const int columns = levels.columns, height = height_of<S>(levels), vectors = height * levels.count;
  Vec* room = aligned<S>(scratch);
  const Tile<S> tile(levels, first_row, height, room);
  Vec* working = Tile<S>::take(room, static_cast<size_t>(padded(columns)) * vectors);
  Vec* error = Tile<S>::take(room, kBlock * vectors);  // negative, so that it is added
  Vec* loss = Tile<S>::take(room, vectors);
  int32_t* active = reinterpret_cast<int32_t*>(room);
  for (int v = 0; v < vectors; ++v) loss[v] = Vec{};
  for (int i = 0; i < padded(columns); ++i)
    for (int r = 0; r < height; ++r) {
      Vec weight = {};
      if (i < columns)
        for (int lane = 0; lane < kLanes<S>; ++lane)
          weight[lane] = c.weight[static_cast<size_t>(tile.row(r, lane)) * columns + i];
      for (int b = 0; b < levels.count; ++b) working[static_cast<size_t>(i) * vectors + b * height + r] = weight;
    }
  for (int start = 0; start < columns; start += kBlock) {
    const int end = start + kBlock < columns ? start + kBlock : columns;
    for (int j = start; j < end;) {
      const Choice<S> choice(tile, c.group[j]);
      do {
        compensate_column(c, tile, choice, start, j, working, error);
        ++j;
      } while (j < end && c.group[j] == choice.group);
    }
    for (int k = 0; k < end - start; ++k)
      for (int v = 0; v < vectors; ++v) loss[v] += error[k * vectors + v] * error[k * vectors + v];
    const int count = find_active<S>(error, vectors, end - start, active);
    push<S>(vectors, working, end, columns, error, start, active, count, c.factor, columns);
  }
  for (int v = 0; v < vectors; ++v)
    for (int lane = 0; lane < kLanes<S>; ++lane) {
      const int row = first_row + v % height * kLanes<S> + lane;
      if (row < levels.rows) c.loss[static_cast<size_t>(v / height) * levels.rows + row] = loss[v][lane];
    }
}

template <class S>
struct Walk {
  using Vec = typename S::Vec;
  using T = typename S::T;
  const Descent<T>& d;
  const int columns, height, vectors, count;
  Vec* room;
  Tile<S> tile;
  Vec *gradient, *codes;      // [columns][vectors], [columns][height]
  Vec *now, *total, *moved;   // [columns of a group][vectors]: values, how far they moved in all, and in one block
  Vec* fitting;               // room of `fit_group`
  int32_t* active;

  static int longest(const CodeLevels<T>& levels) {
    return levels.group_size < levels.columns ? levels.group_size : levels.columns;
  }

  static size_t size(const Descent<T>& d) {
    const auto& levels = d.levels;
    const int height = height_of<S>(levels), vectors = height * levels.count;
    return Tile<S>::room(levels, height) + static_cast<size_t>(padded(levels.columns)) * (vectors + height) +
           static_cast<size_t>(padded(longest(levels))) * vectors * 5 + places(levels.columns, POLYBIT_VECTOR);
  }

  Walk(const Descent<T>& given, int first_row, T* scratch)
      : d(given), columns(d.levels.columns), height(height_of<S>(d.levels)), vectors(height * d.levels.count),
        count(d.levels.count), room(aligned<S>(scratch)), tile(d.levels, first_row, height, room) {
    const size_t group = static_cast<size_t>(padded(longest(d.levels))) * vectors;
    gradient = Tile<S>::take(room, static_cast<size_t>(padded(columns)) * vectors);
    codes = Tile<S>::take(room, static_cast<size_t>(padded(columns)) * height);
    now = Tile<S>::take(room, group);
    total = Tile<S>::take(room, group);
    moved = Tile<S>::take(room, group);
    fitting = Tile<S>::take(room, 2 * group);
    active = reinterpret_cast<int32_t*>(room);
  }

  Vec* gradient_at(int i) { return gradient + static_cast<size_t>(i) * vectors; }

  void read() {
    for (int i = 0; i < columns; ++i)
      for (int r = 0; r < height; ++r) {
        for (int lane = 0; lane < kLanes<S>; ++lane) {
          const size_t at = static_cast<size_t>(tile.row(r, lane)) * columns + i;
          codes[static_cast<size_t>(i) * height + r][lane] = T(d.codes[at]);
          if (d.weight) continue;
          for (int b = 0; b < count; ++b)
            gradient_at(i)[b * height + r][lane] = d.gradient[static_cast<size_t>(b) * tile.levels.rows * columns + at];
        }
      }
    const int given = d.weight ? 0 : columns;
    std::memset(static_cast<void*>(gradient_at(given)), 0, sizeof(Vec) * vectors * (padded(columns) - given));
    if (d.weight) push_errors();
  }

  // gradient = (values - weight) H
  void push_errors() {
    for (int g = 0; g < tile.levels.groups; ++g) {
      const int from = tile.start(g), end = tile.stop(g);
      values(g, total);
      for (int i = from; i < end; ++i)
        for (int r = 0; r < height; ++r) {
          Vec weight;
          for (int lane = 0; lane < kLanes<S>; ++lane)
            weight[lane] = d.weight[static_cast<size_t>(tile.row(r, lane)) * columns + i];
          for (int b = 0; b < count; ++b) total[(i - from) * vectors + b * height + r] -= weight;
        }
      push<S>(vectors, gradient, 0, columns, total, from, active, find_active<S>(total, vectors, end - from, active),
              d.hessian, columns);
    }
  }

  void values(int g, Vec* out) {
    const Choice<S> choice(tile, g);
    for (int i = tile.start(g); i < tile.stop(g); ++i)
      for (int b = 0; b < count; ++b)
        for (int r = 0; r < height; ++r, ++out) *out = choice.value(b, r, codes[static_cast<size_t>(i) * height + r]);
  }

  void fit(int g) {
    const int from = tile.start(g), many = (tile.stop(g) - from) * vectors;
    if (!fit_group<S>(d, tile, g, codes + static_cast<size_t>(from) * height, gradient_at(from), fitting, active)) return;
    values(g, moved);
    for (int n = 0; n < many; ++n) {
      const Vec value = moved[n];
      total[n] = moved[n] = value - now[n];
      now[n] = value;
    }
    push_inside(g, from, tile.stop(g));
  }

  // moved: of the columns from `from` to `end` of group g
  void push_inside(int g, int from, int end) {
    const int found = find_active<S>(moved, vectors, end - from, active);
    push<S>(vectors, gradient, tile.start(g), tile.stop(g), moved, from, active, found, d.hessian, columns);
  }

  // one exact coordinate step for each column of a block; whether a code changed
  bool walk_block(const Choice<S>& choice, int from, int end) {
    const int base = tile.start(choice.group);
    typename S::Ints changed = {};
    int found = 0;  // columns that moved so far, as offsets from `from`
    for (int j = from; j < end; ++j) {
      const T* hessian = d.hessian + static_cast<size_t>(j / kPanelColumns) * columns * kPanelColumns +
                         static_cast<size_t>(from) * kPanelColumns + j % kPanelColumns;
      const T inverse = 1 / d.diagonal[j];
      Vec target[kVectors + 1];
      Vec* value = now + static_cast<size_t>(j - base) * vectors;
      for (int v = 0; v < vectors; ++v) {
        Vec slope = gradient_at(j)[v];
        for (int n = 0; n < found; ++n) slope += moved[active[n] * vectors + v] * hessian[active[n] * kPanelColumns];
        target[v] = value[v] - slope * set<S>(inverse);
      }
      typename S::Ints seen = {};
      for (int r = 0; r < height; ++r) {
        Vec& code = codes[static_cast<size_t>(j) * height + r];
        const Vec chosen = choice(r, target, code, d.held);
        seen |= chosen != code;
        code = chosen;
      }
      Vec* step = moved + (j - from) * vectors;
      if (!any(seen)) {
        for (int v = 0; v < vectors; ++v) step[v] = Vec{};
        continue;
      }
      changed |= seen;
      active[found++] = j - from;
      for (int r = 0; r < height; ++r)
        for (int b = 0; b < count; ++b) {
          const int v = b * height + r;
          const Vec next = choice.value(b, r, codes[static_cast<size_t>(j) * height + r]);
          step[v] = next - value[v];
          total[static_cast<size_t>(j - base) * vectors + v] += step[v];
          value[v] = next;
        }
    }
    return any(changed);
  }

  bool walk_group(int g) {
    const int from = tile.start(g), end = tile.stop(g);
    std::memset(static_cast<void*>(total), 0, sizeof(Vec) * vectors * (end - from));
    values(g, now);
    if (d.fit) fit(g);
    const Choice<S> choice(tile, g);
    bool changed = false;
    for (int start = from; start < end; start += kBlock) {
      const int stop = start + kBlock < end ? start + kBlock : end;
      if (!walk_block(choice, start, stop)) continue;
      changed = true;
      push_inside(g, start, stop);
    }
    // inside the group the gradient was needed at once, elsewhere only now
    const int found = find_active<S>(total, vectors, end - from, active);
    push<S>(vectors, gradient, 0, from, total, from, active, found, d.hessian, columns);
    push<S>(vectors, gradient, end, columns, total, from, active, found, d.hessian, columns);
    return changed;
  }

  void write() {
    const int rows = tile.rows();
    for (int index = 0; index < rows; ++index)
      for (int i = 0; i < columns; ++i) {
        const int r = index / kLanes<S>, lane = index % kLanes<S>;
        const size_t at = static_cast<size_t>(tile.first + index) * columns + i;
        d.codes[at] = static_cast<uint8_t>(codes[static_cast<size_t>(i) * height + r][lane]);
        for (int b = 0; b < count; ++b)
          d.gradient[static_cast<size_t>(b) * tile.levels.rows * columns + at] = gradient_at(i)[b * height + r][lane];
      }
    if (d.fit) tile.write_back();
  }
};

template <class S>
size_t descend_scratch(const Descent<typename S::T>& d) {
  return numbers<S>(Walk<S>::size(d));
}

template <class S>
void descend(const Descent<typename S::T>& d, int first_row, typename S::T* scratch) {
  Walk<S> walk(d, first_row, scratch);
  walk.read();
  for (int sweep = 0; sweep < d.sweeps; ++sweep) {
    bool changed = false;
    for (int g = 0; g < d.levels.groups; ++g) changed = walk.walk_group(g) || changed;
    if (!d.fit && !changed) break;
  }
  walk.write();
}

}  // namespace
}  // namespace polybit
