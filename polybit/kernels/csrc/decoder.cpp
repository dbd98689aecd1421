// A Llama-like decoder that reads rows: each row is one token of one sequence at one width. float32 between the products.
//
// Rows know nothing of each other but the keys and values of their own sequence, and every loop over a row is the same
// whatever else is in the batch: a token's numbers do not depend on who is read beside it, bit for bit. Written as plain
// loops the compiler turns into vector code, once per instruction set where the linker can choose at load time.
#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__) && defined(__GLIBC__) && (defined(__GNUC__) && !defined(__clang__))
#define POLYBIT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define POLYBIT_CLONES
#endif

namespace polybit {
namespace {

constexpr long kShare = 1 << 16;  // multiply-adds of one attention below which a second thread costs more than it saves

// e^x for x <= 0, relative error below 3e-7, 0 below e^-87: 2^n times a polynomial in the rest.
inline float exponential(float x) {
  const float least = std::max(x, -87.0f);
  const float whole = std::floor(least * 1.44269504f + 0.5f);
  const float r = (least - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
  float p = 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t power = (static_cast<int32_t>(whole) + 127) << 23;
  float two;
  std::memcpy(&two, &power, sizeof two);
  return x < -87.0f ? 0.0f : p * two;
}

// y = x / rms(x) * weight; x may be y.
POLYBIT_CLONES void normalize(const float* x, const float* weight, float* y, int n, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += x[i] * x[i];
  const float inverse = 1.0f / std::sqrt(sum / n + eps);
#pragma omp simd
  for (int i = 0; i < n; ++i) y[i] = x[i] * inverse * weight[i];
}

POLYBIT_CLONES void add(float* x, const float* more, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) x[i] += more[i];
}

// Rotary position: the two halves of the first `turned` numbers of a head are turned by one angle each.
POLYBIT_CLONES void rotate(float* head, const float* cosine, const float* sine, int turned) {
  const int half = turned / 2;
#pragma omp simd
  for (int i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cosine[i] - b * sine[i];
    head[i + half] = b * cosine[i + half] + a * sine[i + half];
  }
}

// scores[t] = scale * q . keys[t]; returns the largest.
POLYBIT_CLONES float score(const float* q, const float* keys, float* scores, int first, int last, int size, float scale) {
  float largest = -INFINITY;
  for (int t = first; t < last; ++t) {
    const float* key = keys + static_cast<size_t>(t) * size;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < size; ++i) sum += q[i] * key[i];
    scores[t] = sum * scale;
    largest = std::max(largest, scores[t]);
  }
  return largest;
}

// out = softmax(scores) values
POLYBIT_CLONES void gather(float* scores, float largest, const float* values, float* out, int first, int last, int size) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int t = first; t < last; ++t) {
    scores[t] = exponential(scores[t] - largest);
    total += scores[t];
  }
  const float inverse = 1.0f / total;
  std::fill(out, out + size, 0.0f);
  for (int t = first; t < last; ++t) {
    const float weight = scores[t] * inverse;
    const float* value = values + static_cast<size_t>(t) * size;
#pragma omp simd
    for (int i = 0; i < size; ++i) out[i] += weight * value[i];
  }
}

// silu(gate) * up
POLYBIT_CLONES void gated(const float* gate, const float* up, float* out, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const float g = gate[i], e = exponential(-std::fabs(g));
    out[i] = g * (g >= 0 ? 1.0f : e) / (1.0f + e) * up[i];
  }
}

}  // namespace

int Decoder::add_reading(const std::vector<int>& numbers, const std::vector<int>& digits,
                         const std::vector<const Adapter*>& adapters) {
  const size_t count = blocks_.size() * kProducts;
  if (numbers.size() != count || digits.size() != count || adapters.size() != count)
    throw std::invalid_argument("a reading has a number, digits and an adapter for every product");
  Setting made;
  for (size_t i = 0; i < count; ++i) {
    Layer* layer = blocks_[i / kProducts].products[i % kProducts].layer;
    made.uses.push_back({&layer->weight(numbers[i]), digits[i], adapters[i]});
  }
  settings_.push_back(std::move(made));
  return static_cast<int>(settings_.size()) - 1;
}

void Decoder::reserve(int rows) {
  if (rows <= rows_) return;
  const size_t n = rows;
  const Shape& s = shape_;
  for (auto [buffer, width] : {std::pair{&normed_, s.hidden}, {&o_, s.hidden}, {&q_, s.heads * s.size},
                               {&mixed_, s.heads * s.size}, {&k_, s.kv_heads * s.size}, {&v_, s.kv_heads * s.size},
                               {&gate_, s.middle}, {&up_, s.middle}})
    buffer->resize(n * width);
  rows_ = rows;
}

// Products first..last of a block, all from the same input: in one pass where they are read alike.
void Decoder::multiply(const Block& block, int block_index, int first, int last, const Group* groups, int count,
                       const float* x, float* const* ys) const {
  int row = 0;
  for (const Group* group = groups; group < groups + count; row += group->rows, ++group) {
    const Use* uses = settings_[group->setting].uses.data() + block_index * kProducts;
    Member members[kProducts];
    bool alike = true;
    for (int p = first; p < last; ++p) {
      const Product& product = block.products[p];
      const Weight& w = *uses[p].weight;
      members[p - first] = {&w, ys[p - first] + static_cast<size_t>(row) * w.rows, product.bias, product.bias_type,
                            uses[p].adapter};
      alike = alike && product.shares && uses[p].digits == uses[first].digits;
    }
    const auto inputs = [&](int p) {
      const Layer& layer = *block.products[p].layer;
      const int columns = uses[p].weight->columns;
      return layer.inputs(uses[p].digits, group->rows, 0,
                          reinterpret_cast<uintptr_t>(x + static_cast<size_t>(row) * columns));
    };
    const Kernels& kernels = block.products[first].layer->kernels();
    if (alike) {
      linear(kernels, inputs(first), members, last - first);
    } else {
      for (int p = first; p < last; ++p) linear(kernels, inputs(p), &members[p - first], 1);
    }
  }
}

// y = norm(x += more), row by row.
void Decoder::norm(float* x, const float* more, const float* weight, float* y, int rows) const {
  const int n = shape_.hidden;
#pragma omp parallel for if (static_cast<long>(rows) * n > kShare) schedule(static)
  for (int r = 0; r < rows; ++r) {
    float* row = x + static_cast<size_t>(r) * n;
    if (more) add(row, more + static_cast<size_t>(r) * n, n);
    normalize(row, weight, y + static_cast<size_t>(r) * n, n, shape_.eps);
  }
}

// Keys and values of all rows go into their slots first, so that later rows of a sequence see earlier ones.
void Decoder::attend(const Block& block, const int* slots, const int* positions, int rows) {
  const Shape& s = shape_;
  const int group = s.heads / s.kv_heads, jobs = rows * s.kv_heads;
  const auto head_of = [&](float* all, int r, int h, int heads) {
    return all + (static_cast<size_t>(r) * heads + h) * s.size;
  };
  const auto place = [&](float* cache, int r, int h) {
    return cache + (static_cast<size_t>(slots[r]) * s.kv_heads + h) * s.room * s.size;
  };
  long work = 0;
  for (int r = 0; r < rows; ++r) work += 2L * s.heads * s.size * (positions[r] + 1);
#pragma omp parallel for if (static_cast<long>(rows) * s.kv_heads * s.size * 8 > kShare) schedule(static)
  for (int job = 0; job < jobs; ++job) {
    const int r = job / s.kv_heads, h = job % s.kv_heads;
    const size_t to = static_cast<size_t>(positions[r]) * s.size, turn = static_cast<size_t>(positions[r]) * s.turned;
    float* key = head_of(k_.data(), r, h, s.kv_heads);
    if (block.k_norm) normalize(key, block.k_norm, key, s.size, s.eps);
    rotate(key, cosine_ + turn, sine_ + turn, s.turned);
    std::copy_n(key, s.size, place(block.keys, r, h) + to);
    std::copy_n(head_of(v_.data(), r, h, s.kv_heads), s.size, place(block.values, r, h) + to);
  }
#pragma omp parallel for if (work > kShare) schedule(dynamic, 1)
  for (int job = 0; job < jobs; ++job) {
    static thread_local std::vector<float> scores;
    scores.resize(s.room);
    const int r = job / s.kv_heads, h = job % s.kv_heads, end = positions[r] + 1;
    const int begin = block.window ? std::max(0, end - block.window) : 0;
    const size_t turn = static_cast<size_t>(positions[r]) * s.turned;
    for (int g = h * group; g < (h + 1) * group; ++g) {
      float* one = head_of(q_.data(), r, g, s.heads);
      if (block.q_norm) normalize(one, block.q_norm, one, s.size, s.eps);
      rotate(one, cosine_ + turn, sine_ + turn, s.turned);
      const float largest = score(one, place(block.keys, r, h), scores.data(), begin, end, s.size, block.scale);
      gather(scores.data(), largest, place(block.values, r, h), head_of(mixed_.data(), r, g, s.heads), begin, end, s.size);
    }
  }
}

void Decoder::step(const std::vector<Group>& groups, const std::vector<int>& slots, const std::vector<int>& positions,
                   float* hidden, float* out) {
  const int rows = static_cast<int>(slots.size()), count = static_cast<int>(groups.size());
  int grouped = 0;
  for (const Group& group : groups) {
    if (group.setting < 0 || group.setting >= static_cast<int>(settings_.size())) throw std::invalid_argument("no such reading");
    grouped += group.rows;
  }
  if (grouped != rows || positions.size() != slots.size()) throw std::invalid_argument("rows and groups do not match");
  for (int r = 0; r < rows; ++r)
    if (slots[r] < 0 || slots[r] >= shape_.slots || positions[r] < 0 || positions[r] >= shape_.room)
      throw std::invalid_argument("a row lies outside the cache");
  reserve(rows);
  const float* more = nullptr;
  for (size_t index = 0; index < blocks_.size(); ++index) {
    const Block& block = blocks_[index];
    const int at = static_cast<int>(index);
    norm(hidden, more, block.norm_in, normed_.data(), rows);
    float* const qkv[] = {q_.data(), k_.data(), v_.data()};
    multiply(block, at, 0, 3, groups.data(), count, normed_.data(), qkv);
    attend(block, slots.data(), positions.data(), rows);
    float* const o[] = {o_.data()};
    multiply(block, at, 3, 4, groups.data(), count, mixed_.data(), o);
    norm(hidden, o_.data(), block.norm_mlp, normed_.data(), rows);
    float* const wide[] = {gate_.data(), up_.data()};
    multiply(block, at, 4, 6, groups.data(), count, normed_.data(), wide);
    gated(gate_.data(), up_.data(), gate_.data(), rows * shape_.middle);
    multiply(block, at, 6, 7, groups.data(), count, gate_.data(), o);
    more = o_.data();
  }
  norm(hidden, more, norm_out_, out, rows);
}

void Decoder::copy(int from, int to, int length) {
  if (from < 0 || to < 0 || from >= shape_.slots || to >= shape_.slots || length < 0 || length > shape_.room)
    throw std::invalid_argument("no such slot");
  const size_t head = static_cast<size_t>(shape_.room) * shape_.size, slot = head * shape_.kv_heads;
  for (const Block& block : blocks_)
    for (float* cache : {block.keys, block.values})
      for (int h = 0; h < shape_.kv_heads; ++h)
        std::copy_n(cache + from * slot + h * head, static_cast<size_t>(length) * shape_.size, cache + to * slot + h * head);
}

}  // namespace polybit
