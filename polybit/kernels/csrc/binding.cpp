// The Python face of the kernels: raw addresses in, nothing of torch. Shapes are checked by the caller (ops.py).
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "decoder.h"
#include "layer.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace polybit;

namespace {

std::vector<const Kernels*> all_kernels() {
  std::vector<const Kernels*> found;
  for (const Kernels* k :
       {avx512_kernels(), avxvnni_kernels(), avx2_kernels(), neon_kernels(), portable_kernels()})
    if (k) found.push_back(k);
  return found;
}

const Kernels& chosen(int index) { return *kernels().at(static_cast<size_t>(index)); }

}  // namespace

const std::vector<const Kernels*>& polybit::kernels() {
  static const std::vector<const Kernels*> found = all_kernels();
  return found;
}

NB_MODULE(_cpu, m) {
  m.def("names", [] {
    std::vector<std::string> names;
    for (const Kernels* k : kernels()) names.emplace_back(k->name);
    return names;
  });
  nb::class_<Adapter>(m, "Adapter").def("__init__", [](Adapter* made, uintptr_t down, uintptr_t up, int rank, float scale) {
    new (made) Adapter{at<uint16_t>(down), at<uint16_t>(up), rank, scale};
  });
  nb::class_<Layer>(m, "Layer")
      .def(nb::init<int, uintptr_t, size_t, int, uintptr_t, uintptr_t, uintptr_t, float, float, int, int, int,
                    const std::vector<int>&>(),
           "isa"_a, "planes"_a, "plane_stride"_a, "bits"_a, "scale"_a, "zero"_a, "column_scale"_a, "gain"_a,
           "fixed_zero"_a, "rows"_a, "columns"_a, "group_size"_a, "group_bits"_a = std::vector<int>())
      .def("set_ratio", &Layer::set_ratio)
      .def("add", &Layer::add)
      .def("decode", &Layer::decode, nb::call_guard<nb::gil_scoped_release>())
      .def("decode_rows", &Layer::decode_rows, nb::call_guard<nb::gil_scoped_release>())
      .def("multiply", &Layer::multiply, nb::call_guard<nb::gil_scoped_release>(), "reading"_a, "digits"_a, "tokens"_a,
           "type"_a, "x"_a, "y"_a, "bias"_a, "bias_type"_a, "adapter"_a.none() = nb::none());
  nb::class_<Bundle>(m, "Bundle")
      .def(nb::init<std::vector<Layer*>>(), nb::keep_alive<1, 2>())
      .def("multiply", &Bundle::multiply, nb::call_guard<nb::gil_scoped_release>(), "readings"_a, "digits"_a,
           "tokens"_a, "type"_a, "x"_a, "ys"_a, "biases"_a, "bias_types"_a, "adapters"_a);
  nb::class_<Decoder>(m, "Decoder")
      .def("__init__",
           [](Decoder* made, const std::vector<int>& shape, float eps, uintptr_t cosine, uintptr_t sine,
              uintptr_t norm_out) {
             const Shape s = {shape.at(0), shape.at(1), shape.at(2), shape.at(3), shape.at(4),
                              shape.at(5), shape.at(6), shape.at(7), eps};
             new (made) Decoder(s, at<float>(cosine), at<float>(sine), at<float>(norm_out));
           })
      .def("add_block",
           [](Decoder& decoder, const std::vector<uintptr_t>& places, int window, float scale,
              const std::vector<Layer*>& layers, const std::vector<uintptr_t>& biases,
              const std::vector<int>& bias_types, const std::vector<bool>& shares) {
             Block block = {at<float>(places.at(0)), at<float>(places.at(1)), at<float>(places.at(2)),
                            at<float>(places.at(3)), reinterpret_cast<float*>(places.at(4)),
                            reinterpret_cast<float*>(places.at(5)), window, scale, {}};
             for (int p = 0; p < kProducts; ++p)
               block.products.push_back(
                   {layers.at(p), at<void>(biases.at(p)), static_cast<Type>(bias_types.at(p)), shares.at(p)});
             decoder.add_block(std::move(block));
           },
           nb::keep_alive<1, 5>())
      .def("add_reading", &Decoder::add_reading, nb::keep_alive<1, 4>())
      .def("copy", &Decoder::copy, nb::call_guard<nb::gil_scoped_release>())
      .def("step", [](Decoder& decoder, const std::vector<int>& settings, const std::vector<int>& counts,
                      const std::vector<int>& slots, const std::vector<int>& positions, uintptr_t hidden,
                      uintptr_t out) {
        std::vector<Group> groups;
        for (size_t i = 0; i < settings.size(); ++i) groups.push_back({settings[i], counts.at(i)});
        nb::gil_scoped_release release;
        decoder.step(groups, slots, positions, reinterpret_cast<float*>(hidden), reinterpret_cast<float*>(out));
      });
  m.def("read", [](int isa, uintptr_t bytes, size_t count) {
    nb::gil_scoped_release release;
    return read(chosen(isa), at<void>(bytes), count);
  });
  m.def("multiply", [](int isa, long count) {
    nb::gil_scoped_release release;
    return multiply(chosen(isa), count);
  });
}
