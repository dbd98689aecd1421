// A decoder that reads rows of tokens, many sequences and many widths in one step.
#pragma once

#include <utility>
#include <vector>

#include "layer.h"

namespace polybit {

constexpr int kLanes = 16;  // tokens whose keys lie side by side
constexpr int kProducts = 7;  // of a block: q k v o gate up down

// A layer of a block. shares: it can be multiplied in one pass with its neighbours of the same input.
struct Product {
  Layer* layer;
  const void* bias;
  Type bias_type;
  bool shares;
};

// One block's weights, and its cache: values [slots][kv heads][room][head size], keys [slots][kv heads][room / 16][head
// size][16], with room up to a multiple of 16.
struct Block {
  const float* norm_in;
  const float* norm_mlp;
  const float* q_norm;  // or null
  const float* k_norm;
  float* keys;
  float* values;
  int window;  // tokens that attention looks back, 0 = all
  float scale;
  std::vector<Product> products;
};

struct Shape {
  int heads, kv_heads, size, turned, room, slots, hidden, middle;
  float eps;
};

// Neighbouring rows that are read alike: what `add_reading` returned, and how many they are.
struct Group {
  int setting;
  int rows;
};

// The memory of weights and cache belongs to the caller and must outlive the decoder.
class Decoder {
 public:
  Decoder(Shape shape, const float* cosine, const float* sine, const float* norm_out)
      : shape_(shape), cosine_(cosine), sine_(sine), norm_out_(norm_out) {}

  void add_block(Block block) { blocks_.push_back(std::move(block)); }

  // How every product is read, block by block: the number of the layer's reading, int8 digits of its input, adapter.
  int add_reading(const std::vector<int>& numbers, const std::vector<int>& digits,
                  const std::vector<const Adapter*>& adapters);

  // Rows of hidden states [rows][hidden], overwritten, at their slots and positions -> out [rows][hidden], normed for the
  // output head. Rows of one sequence come in the order of their positions.
  void step(const std::vector<Group>& groups, const std::vector<int>& slots, const std::vector<int>& positions,
            float* hidden, float* out);

  // The first `length` keys and values of one slot into another.
  void copy(int from, int to, int length);

 private:
  int room() const { return (shape_.room + kLanes - 1) / kLanes * kLanes; }

  struct Use {
    const Weight* weight;
    int digits;
    const Adapter* adapter;
  };
  struct Setting {
    std::vector<Use> uses;
  };

  void reserve(int rows);
  void multiply(const Block& block, int block_index, int first, int last, const Group* groups, int count, const float* x,
                float* const* ys) const;
  void norm(float* x, const float* more, const float* weight, float* y, int rows) const;
  void gate(int rows);
  void attend(const Block& block, const int* slots, const int* positions, int rows);

  Shape shape_;
  const float *cosine_, *sine_, *norm_out_;
  std::vector<Block> blocks_;
  std::vector<Setting> settings_;
  int rows_ = 0;
  std::vector<float> normed_, o_, q_, k_, v_, mixed_, gate_, up_;
};

}  // namespace polybit
