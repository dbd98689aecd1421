// Random searches for codes in buffers of exactly the right size, every instruction set against the portable one.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "search.h"

using namespace polybit;

namespace {

std::mt19937 draw(1);
int wrong = 0;

int between(int low, int high) { return low + static_cast<int>(draw() % static_cast<unsigned>(high - low + 1)); }

template <class T>
std::vector<T> normal(size_t count, T scale = 1) {
  std::normal_distribution<T> one(0, scale);
  std::vector<T> found(count);
  for (T& x : found) x = one(draw);
  return found;
}

template <class T>
std::vector<T> pack(const std::vector<T>& matrix, int n) {
  const int panels = (n + kPanelColumns - 1) / kPanelColumns;
  std::vector<T> packed(static_cast<size_t>(panels) * n * kPanelColumns);
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < n; ++k)
      packed[(static_cast<size_t>(i / kPanelColumns) * n + k) * kPanelColumns + i % kPanelColumns] = matrix[k * n + i];
  return packed;
}

template <class T, class Problem>
void all_tiles(const Problem& problem, int rows, int step, size_t scratch, void (*work)(const Problem&, int, T*)) {
  for (int first = 0; first < rows; first += step) {
    const std::unique_ptr<T[]> room(new T[scratch]);
    work(problem, first, room.get());
  }
}

// One random layer and everything that is asked of it; all results, one after another.
template <class T>
struct Layer {
  int rows = between(1, 70), columns = between(1, 150), group_size, groups;
  std::vector<int> widths;
  std::vector<T> weight, hessian, scale, zero, ratio, table, importance;

  Layer() {
    const int sizes[] = {16, 32, 64, columns};
    group_size = sizes[between(0, 3)];
    if (group_size > columns) group_size = columns;
    groups = (columns + group_size - 1) / group_size;
    const int bits = between(2, 8);
    widths.push_back(bits);
    for (int b = bits - 1; b >= 2; --b)
      if (between(0, 1)) widths.push_back(b);
    weight = normal<T>(static_cast<size_t>(rows) * columns, T(0.3));
    const auto half = normal<T>(static_cast<size_t>(columns) * columns, T(0.3) / std::sqrt(T(columns)));
    hessian.assign(half.size(), 0);
    for (int i = 0; i < columns; ++i)
      for (int j = 0; j < columns; ++j) {
        for (int k = 0; k < columns; ++k) hessian[i * columns + j] += half[i * columns + k] * half[j * columns + k];
        if (i == j) hessian[i * columns + j] += 1;
      }
    scale.assign(static_cast<size_t>(rows) * groups, T(1) / (1 << bits));
    zero.assign(scale.size(), T((1 << bits) - 1) / 2);
    ratio.assign(scale.size() * widths.size(), 1);
    for (int n = 0; n < kTable; ++n) table.push_back(T(0.8) + T(0.025) * n);
    for (int i = 0; i < columns; ++i) importance.push_back(hessian[i * columns + i]);
  }

  CodeLevels<T> levels(std::vector<T>& s, std::vector<T>& z, std::vector<T>& r) const {
    CodeLevels<T> made{rows, columns, group_size, groups, widths[0], static_cast<int>(widths.size()), {}, {}, s.data(), z.data(), r.data(), nullptr};
    for (size_t b = 0; b < widths.size(); ++b) made.widths[b] = widths[b], made.emphasis[b] = T(std::pow(4.0, widths[b] - widths[0]));
    return made;
  }

  std::vector<double> run(const SearchKernels<T>& k, bool fit, bool free_zero, int held) const {
    std::vector<double> all;
    std::vector<T> s = scale, z = zero, r = ratio, diagonal, sums(columns);
    std::vector<int32_t> group(columns), bits(groups, widths[0]);
    for (int i = 0; i < columns; ++i) {
      group[i] = i / group_size;
      diagonal.push_back(hessian[i * columns + i]);
      for (int j = 0; j < columns; ++j)
        if (j / group_size == i / group_size) sums[i] += hessian[j * columns + i];
    }
    const auto packed = pack(hessian, columns);
    const T shrinks[] = {1, T(0.8), T(0.6), 1, T(0.9), T(0.8)}, tilts[] = {0, T(0.5)};
    const auto kind = static_cast<typename ScaleSearch<T>::Kind>(held % 3);
    const ScaleSearch<T> clip{rows, columns, group_size, groups, weight.data(), importance.data(), bits.data(), kind,
                              1, shrinks, 3, 2, s.data(), z.data()};
    all_tiles<T>(clip, rows, k.lanes, k.scales_scratch(clip), k.scales);
    for (T x : s) all.push_back(x);
    std::vector<T> alone(ratio.size(), T(0.1)), s2 = scale, z2 = zero;
    const SliceSearch<T> slice{levels(s2, z2, r), weight.data(), importance.data(), alone.data(), free_zero,
                               T((1 << widths[0]) - 1) / 2, 1, shrinks, 3, tilts, 2};
    all_tiles<T>(slice, rows, k.lanes, k.slices_scratch(slice), k.slices);
    for (T x : r) all.push_back(x);
    std::vector<uint8_t> codes(weight.size());
    std::vector<T> loss(static_cast<size_t>(rows) * widths.size());
    // any upper triangle does: the walk is checked, not the mathematics
    const Compensation<T> c{levels(s2, z2, r), weight.data(), packed.data(), diagonal.data(), group.data(), codes.data(), loss.data()};
    const int step = k.tile_rows(c.levels.count, rows);
    all_tiles<T>(c, rows, step, k.compensate_scratch(c), k.compensate);
    for (uint8_t u : codes) all.push_back(u);
    std::vector<T> gradient(weight.size() * widths.size());
    Descent<T> d{levels(s2, z2, r), weight.data(), packed.data(), diagonal.data(), sums.data(), codes.data(), gradient.data(),
                 2, fit, free_zero, 1, {}, held};
    for (size_t b = 1; b < widths.size(); ++b) d.tables[b] = between(0, 1) ? table.data() : nullptr;
    all_tiles<T>(d, rows, step, k.descend_scratch(d), k.descend);
    for (uint8_t u : codes) all.push_back(u);
    return all;
  }
};

template <class T>
void compare(const std::vector<const SearchKernels<T>*>& sets) {
  const Layer<T> layer;
  const bool fit = between(0, 1), free_zero = between(0, 1);
  const int held = fit ? 0 : between(0, layer.widths.back() - 1);
  const auto seed = draw;
  std::vector<double> expected;
  for (const SearchKernels<T>* set : sets) {
    draw = seed;
    const auto found = layer.run(*set, fit, free_zero, held);
    if (expected.empty()) expected = found;
    size_t other = 0;
    for (size_t i = 0; i < found.size(); ++i) other += !(std::abs(found[i] - expected[i]) <= 1e-3);
    // in float32 a tie may fall to the other side, and a row then goes its own way
    if (other * (sizeof(T) == 8 ? 200 : 4) > found.size()) {
      ++wrong;
      std::printf("%s, %zu bytes: %zu of %zu differ from %s (%d x %d, groups of %d)\n", set->name, sizeof(T), other,
                  found.size(), sets[0]->name, layer.rows, layer.columns, layer.group_size);
    }
  }
}

}  // namespace

int main(int, char** arguments) {
  std::vector<const SearchKernels<float>*> single;
  std::vector<const SearchKernels<double>*> twice;
  for (const SearchSet* set : {portable_search(), avx2_search(), avx512_search()}) {
    if (!set) continue;
    single.push_back(&set->single);
    twice.push_back(&set->twice);
  }
  for (int n = std::atoi(arguments[1]); n > 0; --n) {
    compare<float>(single);
    compare<double>(twice);
  }
  std::printf("%zu sets, %d wrong\n", single.size(), wrong);
  return wrong != 0;
}
