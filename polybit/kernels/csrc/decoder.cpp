// A Llama-like decoder that reads rows: each row is one token of one sequence at one width. float32 between the products.
//
// Rows know nothing of each other but the keys and values of their own sequence, and every loop over a row is the same
// whatever else is in the batch: a token's numbers do not depend on who is read beside it, bit for bit. Written as plain
// loops the compiler turns into vector code, once per instruction set where the linker can choose at load time.
#include "decoder.h"

#include "clones.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // nothing here that returns vectors is called: all of it is inlined
#endif
#define POLYBIT_INLINE inline __attribute__((always_inline))  // into every clone

namespace polybit {
namespace {

constexpr long kShare = 1 << 16;  // multiply-adds of one attention below which a second thread costs more than it saves

// Sixteen numbers at once, whatever the registers are. By hand, because GCC leaves loops over the exponential scalar.
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t Whole __attribute__((vector_size(4 * kLanes)));

POLYBIT_INLINE Lanes load(const float* p) {
  Lanes found;
  std::memcpy(&found, p, sizeof found);
  return found;
}

POLYBIT_INLINE void store(float* p, Lanes value) { std::memcpy(p, &value, sizeof value); }

// e^x for x <= 0, relative error below 3e-7, 0 below e^-87: 2^n times a polynomial in the rest.
POLYBIT_INLINE Lanes exponential(Lanes x) {
  const Lanes scaled = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: its last bit counts ones
  const Lanes n = scaled - 12582912.0f;
  const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Lanes p = r * (1.0f / 720.0f) + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Whole power = ((Whole)scaled - 0x4B400000 + 127) << 23;
  const Whole seen = x >= -87.0f;  // all bits where true
  return (Lanes)((Whole)(p * (Lanes)power) & seen);
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

// Keys lie in blocks of sixteen tokens, [dimension][token], so that a score is a sum of its own lane.
// scores[h][t] = scale * q[h] . keys[t] of `Heads` heads for whole blocks of keys; the sum over even dimensions, then odd.
// Nothing of a cache outlives the weights of a step in the processor's: the next keys and the values of these are fetched.
template <int Heads>
POLYBIT_INLINE void score(const float* q, const float* keys, const float* values, float* scores, int first, int last,
                          int size, int room, float scale) {
  const size_t block = static_cast<size_t>(kLanes) * size;
  for (int t = first; t < last; t += kLanes) {
    const float* key = keys + static_cast<size_t>(t) * size;
    const float* value = values + static_cast<size_t>(t) * size;
    Lanes sum[Heads][2] = {};
    for (int i = 0; i + 1 < size; i += 2) {
      for (int j = i; j < i + 2; ++j) {
        __builtin_prefetch(key + block + j * kLanes, 0, 3);
        __builtin_prefetch(value + j * kLanes, 0, 2);
      }
      const Lanes even = load(key + i * kLanes), odd = load(key + (i + 1) * kLanes);
      for (int h = 0; h < Heads; ++h) {
        sum[h][0] += q[h * size + i] * even;
        sum[h][1] += q[h * size + i + 1] * odd;
      }
    }
    if (size % 2)
      for (int h = 0; h < Heads; ++h) sum[h][0] += q[h * size + size - 1] * load(key + (size - 1) * kLanes);
    for (int h = 0; h < Heads; ++h) store(scores + static_cast<size_t>(h) * room + t, (sum[h][0] + sum[h][1]) * scale);
  }
}

// Scores of first..end become shares, whole blocks from `from` to `to`: what lies outside gets none.
POLYBIT_INLINE void soften(float* scores, int from, int first, int end, int to) {
  std::fill(scores + from, scores + first, -INFINITY);
  std::fill(scores + end, scores + to, -INFINITY);
  Lanes top = load(scores + from);
  for (int t = from + kLanes; t < to; t += kLanes) {
    const Lanes one = load(scores + t);
    top = one > top ? one : top;
  }
  float largest = -INFINITY;
  for (int i = 0; i < kLanes; ++i) largest = std::max(largest, top[i]);
  Lanes sum = {};
  for (int t = from; t < to; t += kLanes) {
    const Lanes one = exponential(load(scores + t) - largest);
    store(scores + t, one);
    sum += one;
  }
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  const float inverse = 1.0f / total;
  for (int t = from; t < to; t += kLanes) store(scores + t, load(scores + t) * inverse);
}

// out[h] = shares[h] values of `Heads` heads, `Wide` times sixteen dimensions of them.
template <int Heads, int Wide>
POLYBIT_INLINE void gather(const float* shares, const float* values, float* out, int first, int end, int size, int room) {
  Lanes sum[Heads][Wide] = {};
  for (int t = first; t < end; ++t) {
    const float* value = values + static_cast<size_t>(t) * size;
    for (int d = 0; d < Wide; ++d) {
      const Lanes one = load(value + d * kLanes);
      for (int h = 0; h < Heads; ++h) sum[h][d] += shares[static_cast<size_t>(h) * room + t] * one;
    }
  }
  for (int h = 0; h < Heads; ++h)
    for (int d = 0; d < Wide; ++d) store(out + h * size + d * kLanes, sum[h][d]);
}

// Attention of `Heads` query heads over one key head. q, out: [Heads][size] · scores: [Heads][room].
template <int Heads>
POLYBIT_INLINE void attend_heads(const float* q, const float* keys, const float* values, float* scores, float* out, int begin,
                         int end, int size, int room, float scale) {
  const int from = begin / kLanes * kLanes, to = (end + kLanes - 1) / kLanes * kLanes;
  score<Heads>(q, keys, values, scores, from, to, size, room, scale);
  for (int h = 0; h < Heads; ++h) soften(scores + static_cast<size_t>(h) * room, from, begin, end, to);
  int d = 0;
  for (; d + 4 * kLanes <= size; d += 4 * kLanes) gather<Heads, 4>(scores, values + d, out + d, begin, end, size, room);
  for (; d + kLanes <= size; d += kLanes) gather<Heads, 1>(scores, values + d, out + d, begin, end, size, room);
  for (; d < size; ++d)
    for (int h = 0; h < Heads; ++h) {
      float sum = 0;
      for (int t = begin; t < end; ++t) sum += scores[static_cast<size_t>(h) * room + t] * values[static_cast<size_t>(t) * size + d];
      out[h * size + d] = sum;
    }
}

POLYBIT_CLONES void attend_some(int heads, const float* q, const float* keys, const float* values, float* scores,
                                float* out, int begin, int end, int size, int room, float scale) {
  while (heads > 0) {
    const int now = heads >= 4 ? 4 : heads;
    if (now == 4) attend_heads<4>(q, keys, values, scores, out, begin, end, size, room, scale);
    if (now == 3) attend_heads<3>(q, keys, values, scores, out, begin, end, size, room, scale);
    if (now == 2) attend_heads<2>(q, keys, values, scores, out, begin, end, size, room, scale);
    if (now == 1) attend_heads<1>(q, keys, values, scores, out, begin, end, size, room, scale);
    q += now * size, out += now * size, heads -= now;
  }
}

POLYBIT_INLINE Lanes gated(Lanes gate, Lanes up) {
  const Lanes e = exponential(gate < 0.0f ? gate : -gate);
  return gate * (gate < 0.0f ? e : e * 0.0f + 1.0f) / (1.0f + e) * up;
}

// silu(gate) * up
POLYBIT_CLONES void gate_row(const float* gate, const float* up, float* out, int n) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, gated(load(gate + i), load(up + i)));
  if (i == n) return;
  float rest[2][kLanes] = {};
  std::copy(gate + i, gate + n, rest[0]);
  std::copy(up + i, up + n, rest[1]);
  store(rest[0], gated(load(rest[0]), load(rest[1])));
  std::copy_n(rest[0], n - i, out + i);
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

// gate_ = silu(gate_) * up_, row by row.
void Decoder::gate(int rows) {
  const int n = shape_.middle;
#pragma omp parallel for if (static_cast<long>(rows) * n * 4 > kShare) schedule(static)
  for (int r = 0; r < rows; ++r) {
    float* row = gate_.data() + static_cast<size_t>(r) * n;
    gate_row(row, up_.data() + static_cast<size_t>(r) * n, row, n);
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
    return cache + (static_cast<size_t>(slots[r]) * s.kv_heads + h) * room() * s.size;
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
    const int lane = positions[r] % kLanes;
    float* keys = place(block.keys, r, h) + static_cast<size_t>(positions[r] - lane) * s.size + lane;
    for (int i = 0; i < s.size; ++i) keys[i * kLanes] = key[i];
    std::copy_n(head_of(v_.data(), r, h, s.kv_heads), s.size, place(block.values, r, h) + to);
  }
#pragma omp parallel for if (work > kShare) schedule(dynamic, 1)
  for (int job = 0; job < jobs; ++job) {
    static thread_local std::vector<float> scores;
    scores.resize(static_cast<size_t>(std::min(group, 4)) * room());
    const int r = job / s.kv_heads, h = job % s.kv_heads, end = positions[r] + 1;
    const int begin = block.window ? std::max(0, end - block.window) : 0;
    const size_t turn = static_cast<size_t>(positions[r]) * s.turned;
    float* const first = head_of(q_.data(), r, h * group, s.heads);
    for (int g = 0; g < group; ++g) {
      float* one = first + g * s.size;
      if (block.q_norm) normalize(one, block.q_norm, one, s.size, s.eps);
      rotate(one, cosine_ + turn, sine_ + turn, s.turned);
    }
    attend_some(group, first, place(block.keys, r, h), place(block.values, r, h), scores.data(),
                head_of(mixed_.data(), r, h * group, s.heads), begin, end, s.size, room(), block.scale);
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
    gate(rows);
    multiply(block, at, 6, 7, groups.data(), count, gate_.data(), o);
    more = o_.data();
  }
  norm(hidden, more, norm_out_, out, rows);
}

void Decoder::copy(int from, int to, int length) {
  if (from < 0 || to < 0 || from >= shape_.slots || to >= shape_.slots || length < 0 || length > shape_.room)
    throw std::invalid_argument("no such slot");
  length = (length + kLanes - 1) / kLanes * kLanes;  // whole blocks of keys
  const size_t head = static_cast<size_t>(room()) * shape_.size, slot = head * shape_.kv_heads;
  for (const Block& block : blocks_)
    for (float* cache : {block.keys, block.values})
      for (int h = 0; h < shape_.kv_heads; ++h)
        std::copy_n(cache + from * slot + h * head, static_cast<size_t>(length) * shape_.size, cache + to * slot + h * head);
}

}  // namespace polybit
