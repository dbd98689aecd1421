// The Python face of the kernels: raw addresses in, nothing of torch. Shapes are checked by the caller (ops.py).
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "linear.h"

namespace nb = nanobind;
using namespace polybit;

namespace {

std::vector<const Kernels*> all_kernels() {
  std::vector<const Kernels*> found;
  for (const Kernels* k :
       {avx512_kernels(), avxvnni_kernels(), avx2_kernels(), neon_kernels(), portable_kernels()})
    if (k) found.push_back(k);
  return found;
}

const std::vector<const Kernels*>& kernels() {
  static const std::vector<const Kernels*> found = all_kernels();
  return found;
}

const Kernels& chosen(int index) { return *kernels().at(static_cast<size_t>(index)); }

// The sixteen equally spaced ratios between two ends, with the reference's bits.
void fill_ratios(float* ratios, double low, double high) {
  const double step = (high - low) / 15.0;
  for (int i = 0; i < 16; ++i) ratios[i] = static_cast<float>(low + step * i);
}

template <class T>
const T* at(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

Weight make_weight(uintptr_t planes, size_t plane_stride, int bits, uintptr_t scale, uintptr_t zero, uintptr_t ratio,
                   float gain, float fixed_zero, double low, double high, int rows, int columns, int group_size,
                   int width) {
  if (width < 1 || width > bits || bits > 8) throw std::invalid_argument("width out of range");
  if (group_size != 0 && group_size != 32 && group_size != 64 && group_size != 128 && group_size != 256)
    throw std::invalid_argument("group size out of range");
  Weight w{};
  w.planes = at<uint8_t>(planes);
  w.plane_stride = plane_stride;
  w.scale = at<uint16_t>(scale);
  w.zero = at<uint8_t>(zero);
  w.ratio = at<uint8_t>(ratio);
  w.gain = gain;
  w.fixed_zero = fixed_zero;
  fill_ratios(w.ratios, low, high);
  w.bits = bits;
  w.width = width;
  w.rows = rows;
  w.columns = columns;
  w.row_blocks = (rows + kRows - 1) / kRows;
  w.column_blocks = (columns + kColumns - 1) / kColumns;
  w.groups = group_size ? (columns + group_size - 1) / group_size : 1;
  w.chunk_blocks = group_size == 32 ? 1 : group_size == 64 ? 2 : 4;
  w.group_shift = group_size == 0 ? 31 : group_size == 256 ? 1 : 0;
  w.chunks = (w.column_blocks + w.chunk_blocks - 1) / w.chunk_blocks;
  return w;
}

// A weight whose addresses and numbers are handed over once, so that a call carries little. The owner of the memory must
// outlive it.
class Layer {
 public:
  Layer(int isa, uintptr_t planes, size_t plane_stride, int bits, uintptr_t scale, uintptr_t zero,
        uintptr_t column_scale, float gain, float fixed_zero, int rows, int columns, int group_size)
      : kernels_(chosen(isa)), column_scale_(at<uint16_t>(column_scale)) {
    for (int width = 1; width <= bits; ++width)
      weight_[width] = make_weight(planes, plane_stride, bits, scale, zero, 0, gain, fixed_zero, 1.0, 1.0, rows,
                                   columns, group_size, width);
    bits_ = bits;
  }

  void set_ratio(int width, uintptr_t index, double low, double high) {
    Weight& w = checked(width);
    w.ratio = at<uint8_t>(index);
    fill_ratios(w.ratios, low, high);
  }

  void multiply(int width, int digits, int tokens, int type, uintptr_t x, uintptr_t y, uintptr_t bias, int bias_type) {
    const Inputs in = {at<void>(x), static_cast<Type>(type), tokens, column_scale_, digits};
    const Outputs out = {reinterpret_cast<void*>(y), at<void>(bias), static_cast<Type>(bias_type)};
    linear(kernels_, checked(width), in, out);
  }

 private:
  Weight& checked(int width) {
    if (width < 1 || width > bits_) throw std::invalid_argument("width out of range");
    return weight_[width];
  }

  const Kernels& kernels_;
  const uint16_t* column_scale_;
  Weight weight_[9] = {};
  int bits_ = 0;
};

}  // namespace

NB_MODULE(_cpu, m) {
  m.def("names", [] {
    std::vector<std::string> names;
    for (const Kernels* k : kernels()) names.emplace_back(k->name);
    return names;
  });
  m.def("linear", [](int isa, uintptr_t x, int type, int tokens, int digits, uintptr_t y, uintptr_t bias,
                     int bias_type, uintptr_t planes, size_t plane_stride, int bits, uintptr_t scale, uintptr_t zero,
                     uintptr_t ratio, uintptr_t column_scale, float gain, float fixed_zero, double low, double high,
                     int rows, int columns, int group_size, int width) {
    const Weight w = make_weight(planes, plane_stride, bits, scale, zero, ratio, gain, fixed_zero, low, high, rows,
                                 columns, group_size, width);
    const Inputs in = {at<void>(x), static_cast<Type>(type), tokens, at<uint16_t>(column_scale), digits};
    const Outputs out = {reinterpret_cast<void*>(y), at<void>(bias), static_cast<Type>(bias_type)};
    nb::gil_scoped_release release;
    linear(chosen(isa), w, in, out);
  });
  m.def("decode", [](int isa, uintptr_t out, uintptr_t planes, size_t plane_stride, int bits, uintptr_t scale,
                     uintptr_t zero, uintptr_t ratio, uintptr_t column_scale, float gain, float fixed_zero, double low,
                     double high, int rows, int columns, int group_size, int width) {
    const Weight w = make_weight(planes, plane_stride, bits, scale, zero, ratio, gain, fixed_zero, low, high, rows,
                                 columns, group_size, width);
    nb::gil_scoped_release release;
    decode(chosen(isa), w, at<uint16_t>(column_scale), reinterpret_cast<float*>(out));
  });
  nb::class_<Layer>(m, "Layer")
      .def(nb::init<int, uintptr_t, size_t, int, uintptr_t, uintptr_t, uintptr_t, float, float, int, int, int>())
      .def("set_ratio", &Layer::set_ratio)
      .def("multiply", &Layer::multiply, nb::call_guard<nb::gil_scoped_release>());
  m.def("read", [](int isa, uintptr_t bytes, size_t count) {
    nb::gil_scoped_release release;
    return read(chosen(isa), at<void>(bytes), count);
  });
  m.def("multiply", [](int isa, long count) {
    nb::gil_scoped_release release;
    return multiply(chosen(isa), count);
  });
}
