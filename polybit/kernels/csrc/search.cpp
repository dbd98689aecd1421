// The search for codes, shared out among threads, and its Python face: raw addresses in, nothing of torch. Shapes are
// checked by the caller (kernels/search.py).
#include "search.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace nb = nanobind;
using namespace polybit;

namespace {

int available_threads() {
#if defined(_OPENMP)
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// Every tile of rows by some thread; a tile's result does not depend on which.
template <class T, class Problem>
void share(const Problem& problem, int rows, int step, size_t scratch, void (*work)(const Problem&, int, T*)) {
  const int tiles = (rows + step - 1) / step;
#pragma omp parallel num_threads(std::min(tiles, available_threads()))
  {
    const std::unique_ptr<T[]> room(new T[scratch]);
#pragma omp for schedule(dynamic, 1)
    for (int tile = 0; tile < tiles; ++tile) work(problem, tile * step, room.get());
  }
}

const std::vector<const SearchSet*>& sets() {
  static const std::vector<const SearchSet*> found = [] {
    std::vector<const SearchSet*> made;
    for (const SearchSet* set : {avx512_search(), avx2_search(), portable_search()})
      if (set) made.push_back(set);
    return made;
  }();
  return found;
}

template <class T>
const SearchKernels<T>& kernels(int isa) {
  const SearchSet& set = *sets().at(static_cast<size_t>(isa));
  if constexpr (sizeof(T) == 4)
    return set.single;
  else
    return set.twice;
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A square matrix as panels of four neighbouring columns, [n / 4 rounded up][n][4], zero beyond its edge.
template <class T>
std::unique_ptr<T[]> pack(const T* matrix, int n) {
  const int panels = (n + kPanelColumns - 1) / kPanelColumns;
  std::unique_ptr<T[]> packed(new T[static_cast<size_t>(panels) * n * kPanelColumns]);
#pragma omp parallel for schedule(static) num_threads(available_threads())
  for (int p = 0; p < panels; ++p)
    for (int k = 0; k < n; ++k)
      for (int j = 0; j < kPanelColumns; ++j) {
        const int i = p * kPanelColumns + j;
        packed[(static_cast<size_t>(p) * n + k) * kPanelColumns + j] = i < n ? matrix[static_cast<size_t>(k) * n + i] : 0;
      }
  return packed;
}

template <class T>
std::vector<T> diagonal(const T* matrix, int n) {
  std::vector<T> found(n);
  for (int i = 0; i < n; ++i) found[i] = matrix[static_cast<size_t>(i) * (n + 1)];
  return found;
}

// What codes mean, as the Python side hands it over; scale, zero and ratio are written to.
template <class T>
class Levels {
 public:
  Levels(int rows, int columns, int group_size, int bits, const std::vector<int>& widths, const std::vector<double>& emphasis,
         uintptr_t scale, uintptr_t zero, uintptr_t ratio, const std::vector<int>& group_bits)
      : group_bits_(group_bits) {
    if (widths.empty() || widths.size() > kMostWidths || widths.size() != emphasis.size() || rows < 1 || columns < 1 ||
        bits > 8 || widths[0] > bits)
      throw std::invalid_argument("shape or widths out of range");
    raw_.rows = rows;
    raw_.columns = columns;
    raw_.group_size = group_size ? group_size : columns;
    raw_.groups = (columns + raw_.group_size - 1) / raw_.group_size;
    if (!group_bits.empty() && static_cast<int>(group_bits.size()) != raw_.groups)
      throw std::invalid_argument("one width per group");
    raw_.bits = bits;
    raw_.count = static_cast<int>(widths.size());
    for (int b = 0; b < raw_.count; ++b) {
      if (widths[b] < 1 || widths[b] > 8 || (b && widths[b] >= widths[b - 1]))
        throw std::invalid_argument("widths out of range");
      raw_.widths[b] = widths[b];
      raw_.emphasis[b] = static_cast<T>(emphasis[b]);
    }
    raw_.scale = at<T>(scale);
    raw_.zero = at<T>(zero);
    raw_.ratio = at<T>(ratio);
    raw_.group_bits = nullptr;
  }

  CodeLevels<T> get() const {
    CodeLevels<T> levels = raw_;
    levels.group_bits = group_bits_.empty() ? nullptr : group_bits_.data();
    return levels;
  }

 private:
  CodeLevels<T> raw_{};
  std::vector<int32_t> group_bits_;
};

template <class T>
void compensate(int isa, const Levels<T>& levels, uintptr_t weight, uintptr_t factor, const std::vector<int>& group,
                uintptr_t codes, uintptr_t loss) {
  const nb::gil_scoped_release release;
  const int n = levels.get().columns;
  if (static_cast<int>(group.size()) != n || levels.get().widths[0] != levels.get().bits) throw std::invalid_argument("one group per column, and the widest width first");
  const auto packed = pack(at<const T>(factor), n);
  const auto diagonals = diagonal(at<const T>(factor), n);
  const std::vector<int32_t> groups(group.begin(), group.end());
  const Compensation<T> c{levels.get(), at<const T>(weight), packed.get(), diagonals.data(), groups.data(), at<uint8_t>(codes),
                          at<T>(loss)};
  const auto& k = kernels<T>(isa);
  share<T>(c, c.levels.rows, k.tile_rows(c.levels.count, c.levels.rows), k.compensate_scratch(c), k.compensate);
}

template <class T>
void descend(int isa, const Levels<T>& levels, uintptr_t weight, uintptr_t hessian, uintptr_t codes, uintptr_t gradient,
             int sweeps, bool fit, bool zero, double gain, const std::vector<uintptr_t>& tables, int held) {
  const nb::gil_scoped_release release;
  Descent<T> d{};
  d.levels = levels.get();
  if (sweeps && d.levels.widths[0] != d.levels.bits) throw std::invalid_argument("the widest width first");
  const int n = d.levels.columns;
  const T* matrix = at<const T>(hessian);
  const auto packed = pack(matrix, n);
  const auto diagonals = diagonal(matrix, n);
  std::vector<T> sums(n);
  for (int k = 0; k < n; ++k) {
    const int first = k / d.levels.group_size * d.levels.group_size, last = std::min(first + d.levels.group_size, n);
    for (int i = first; i < last; ++i) sums[i] += matrix[static_cast<size_t>(k) * n + i];
  }
  d.weight = at<const T>(weight);
  d.hessian = packed.get();
  d.diagonal = diagonals.data();
  d.sums = sums.data();
  d.codes = at<uint8_t>(codes);
  d.gradient = at<T>(gradient);
  d.sweeps = sweeps;
  d.fit = fit;
  d.zero = zero;
  d.gain = static_cast<T>(gain);
  d.held = held;
  for (size_t b = 0; b < tables.size() && b < kMostWidths; ++b) d.tables[b] = at<const T>(tables[b]);
  const auto& k = kernels<T>(isa);
  share<T>(d, d.levels.rows, k.tile_rows(d.levels.count, d.levels.rows), k.descend_scratch(d), k.descend);
}

template <class T>
void scales(int isa, int rows, int columns, int group_size, uintptr_t weight, uintptr_t importance,
            const std::vector<int>& bits, int kind, double gain, const std::vector<double>& shrinks, int points,
            int refine, uintptr_t scale, uintptr_t zero) {
  const nb::gil_scoped_release release;
  const std::vector<T> numbers(shrinks.begin(), shrinks.end());
  const std::vector<int32_t> widths(bits.begin(), bits.end());
  const int size = group_size ? group_size : columns;
  if (static_cast<int>(numbers.size()) != 2 * points || static_cast<int>(widths.size()) != (columns + size - 1) / size)
    throw std::invalid_argument("clipping ranges or group widths do not fit");
  const ScaleSearch<T> s{rows, columns, size, static_cast<int>(widths.size()), at<const T>(weight), at<const T>(importance),
                         widths.data(), static_cast<typename ScaleSearch<T>::Kind>(kind), static_cast<T>(gain),
                         numbers.data(), points, refine, at<T>(scale), at<T>(zero)};
  const auto& k = kernels<T>(isa);
  share<T>(s, rows, k.lanes, k.scales_scratch(s), k.scales);
}

template <class T>
void slices(int isa, const Levels<T>& levels, uintptr_t weight, uintptr_t importance, uintptr_t alone, bool zero,
            double fixed_zero, double gain, const std::vector<double>& shrinks, const std::vector<double>& tilts) {
  const nb::gil_scoped_release release;
  const std::vector<T> ranges(shrinks.begin(), shrinks.end()), leans(tilts.begin(), tilts.end());
  const SliceSearch<T> s{levels.get(), at<const T>(weight), at<const T>(importance), at<const T>(alone), zero,
                         static_cast<T>(fixed_zero), static_cast<T>(gain), ranges.data(), static_cast<int>(ranges.size()),
                         leans.data(), static_cast<int>(leans.size())};
  const auto& k = kernels<T>(isa);
  share<T>(s, s.levels.rows, k.lanes, k.slices_scratch(s), k.slices);
}

template <class T>
void define(nb::module_& m, const char* levels, const char* suffix) {
  nb::class_<Levels<T>>(m, levels)
      .def(nb::init<int, int, int, int, const std::vector<int>&, const std::vector<double>&, uintptr_t, uintptr_t, uintptr_t,
                    const std::vector<int>&>());
  const std::string end = suffix;
  m.def(("compensate" + end).c_str(), &compensate<T>);
  m.def(("descend" + end).c_str(), &descend<T>);
  m.def(("scales" + end).c_str(), &scales<T>);
  m.def(("slices" + end).c_str(), &slices<T>);
}

}  // namespace

NB_MODULE(_search, m) {
  m.def("names", [] {
    std::vector<std::string> names;
    for (const SearchSet* set : sets()) names.emplace_back(set->single.name);
    return names;
  });
  m.attr("version") = 2;  // of what is passed between it and kernels/search.py
  define<float>(m, "Levels32", "32");
  define<double>(m, "Levels64", "64");
}
