// A stored weight and bundles of them as a caller holds them: addresses and numbers handed over once.
#pragma once

#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "linear.h"
#include "stored.h"

namespace polybit {

// The sets this processor can run, fastest first.
const std::vector<const Kernels*>& kernels();

// The sixteen equally spaced ratios between two ends, with the reference's bits.
inline void fill_ratios(float* ratios, double low, double high) {
  const double step = (high - low) / 15.0;
  for (int i = 0; i < 16; ++i) ratios[i] = static_cast<float>(low + step * i);
}

template <class T>
const T* at(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

// A stored weight whose addresses and numbers are handed over once, so that a call carries little. The owner of the
// memory must outlive it. What it is read at has a number: a width for all groups, or what `add` returned.
class Layer {
 public:
  Layer(int isa, uintptr_t planes, size_t plane_stride, int bits, uintptr_t scale, uintptr_t zero,
        uintptr_t column_scale, float gain, float fixed_zero, int rows, int columns, int group_size,
        const std::vector<int>& group_bits)
      : kernels_(*polybit::kernels().at(static_cast<size_t>(isa))), column_scale_(at<uint16_t>(column_scale)) {
    if (bits < 1 || bits > 8) throw std::invalid_argument("width out of range");
    if (group_size != 0 && group_size != 32 && group_size != 64 && group_size != 128 && group_size != 256)
      throw std::invalid_argument("group size out of range");
    stored_.planes = at<uint8_t>(planes);
    stored_.plane_stride = plane_stride;
    stored_.bits = bits;
    stored_.scale = at<uint16_t>(scale);
    stored_.zero = at<uint8_t>(zero);
    stored_.gain = gain;
    stored_.fixed_zero = fixed_zero;
    stored_.rows = rows;
    stored_.columns = columns;
    stored_.group_size = group_size;
    stored_.group_bits = group_bits;
    readings_.resize(kFirstOwn);
  }

  void set_ratio(int width, uintptr_t index, double low, double high) {
    const std::lock_guard<std::mutex> guard(lock_);
    if (width < 1 || width > stored_.bits) throw std::invalid_argument("width out of range");
    stored_.ratio[width].index = at<uint8_t>(index);
    fill_ratios(stored_.ratio[width].levels, low, high);
    readings_.clear();
    readings_.resize(kFirstOwn);
  }

  // The number of a reading with a width for every group, in the order of the columns.
  int add(const std::vector<int>& widths) {
    auto made = std::make_unique<Reading>(stored_, widths);
    const std::lock_guard<std::mutex> guard(lock_);
    readings_.push_back(std::move(made));
    return static_cast<int>(readings_.size()) - 1;
  }

  void multiply(int reading, int digits, int tokens, int type, uintptr_t x, uintptr_t y, uintptr_t bias, int bias_type,
                const Adapter* adapter) {
    const Member member = {&weight(reading), reinterpret_cast<void*>(y), at<void>(bias), static_cast<Type>(bias_type),
                           adapter};
    linear(kernels_, inputs(digits, tokens, type, x), &member, 1);
  }

  void decode(int reading, uintptr_t out) {
    polybit::decode(kernels_, weight(reading), column_scale_, reinterpret_cast<float*>(out));
  }

  // Single rows of the float weight, [rows.size()][columns].
  void decode_rows(int reading, const std::vector<int>& rows, uintptr_t out) {
    const Weight& w = weight(reading);
    for (int row : rows)
      if (row < 0 || row >= w.rows) throw std::invalid_argument("no such row");
    polybit::decode_rows(kernels_, w, column_scale_, rows, reinterpret_cast<float*>(out));
  }

  const Weight& weight(int reading) {
    const std::lock_guard<std::mutex> guard(lock_);
    if (reading < 1 || reading >= static_cast<int>(readings_.size()) ||
        (reading < kFirstOwn && reading > stored_.bits))
      throw std::invalid_argument("width out of range");
    auto& found = readings_[reading];
    if (!found) found = std::make_unique<Reading>(stored_, reading);
    return found->weight();
  }

  Inputs inputs(int digits, int tokens, int type, uintptr_t x) const {
    return {at<void>(x), static_cast<Type>(type), tokens, column_scale_, digits};
  }

  const Kernels& kernels() const { return kernels_; }

 private:
  static constexpr int kFirstOwn = 9;
  const Kernels& kernels_;
  const uint16_t* column_scale_;
  Stored stored_{};
  std::vector<std::unique_ptr<Reading>> readings_;
  std::mutex lock_;  // calls come without the interpreter's lock
};

// Layers with the same columns, groups and column scale, multiplied by one input in one pass.
class Bundle {
 public:
  explicit Bundle(std::vector<Layer*> layers) : layers_(std::move(layers)) {
    const Weight &first = layers_.at(0)->weight(1);
    for (Layer* layer : layers_)
      if (layer->weight(1).columns != first.columns || layer->weight(1).chunk_blocks != first.chunk_blocks)
        throw std::invalid_argument("the layers of a bundle must have the same columns and groups");
  }

  void multiply(const std::vector<int>& readings, int digits, int tokens, int type, uintptr_t x,
                const std::vector<uintptr_t>& ys, const std::vector<uintptr_t>& biases,
                const std::vector<int>& bias_types, const std::vector<const Adapter*>& adapters) {
    std::vector<Member> members(layers_.size());
    for (size_t i = 0; i < layers_.size(); ++i)
      members[i] = {&layers_[i]->weight(readings.at(i)), reinterpret_cast<void*>(ys.at(i)), at<void>(biases.at(i)),
                    static_cast<Type>(bias_types.at(i)), adapters.at(i)};
    linear(layers_[0]->kernels(), layers_[0]->inputs(digits, tokens, type, x), members.data(),
           static_cast<int>(members.size()));
  }

 private:
  std::vector<Layer*> layers_;
};

}  // namespace polybit
