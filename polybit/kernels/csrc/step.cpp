// What a decoder does between its products when it reads one token: norm, rotation, attention, gate. float32 throughout.
//
// Written as plain loops the compiler turns into vector code, once per instruction set where the linker can choose at
// load time. Addresses come from torch; shapes are checked by the caller (step.py).
#include "clones.h"

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace nb = nanobind;

namespace {

constexpr int kShare = 1 << 16;  // multiply-adds of one attention below which a second thread costs more than it saves

float* at(uintptr_t address) { return reinterpret_cast<float*>(address); }

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

// Shapes of one attention; kept between calls, so that a call carries little.
class Attention {
 public:
  Attention(int heads, int kv_heads, int size, int turned, int room, float scale, int window, uintptr_t q_norm,
            uintptr_t k_norm, float eps, uintptr_t keys, uintptr_t values)
      : heads_(heads), kv_heads_(kv_heads), size_(size), turned_(turned), room_(room), window_(window), scale_(scale),
        eps_(eps), q_norm_(at(q_norm)), k_norm_(at(k_norm)), keys_(at(keys)), values_(at(values)),
        scores_(static_cast<size_t>(heads) * room) {}

  // One token: q [heads * size] and k [kv_heads * size] are normed and turned in place, k and v [kv_heads * size] go
  // into the cache [kv_heads, room, size] at `position`, and out [heads * size] is what attention over it gives.
  void step(uintptr_t q_at, uintptr_t k_at, uintptr_t v_at, uintptr_t cosine_at, uintptr_t sine_at, uintptr_t out_at,
            int position) {
    float *q = at(q_at), *k = at(k_at), *out = at(out_at);
    const float *v = at(v_at), *cosine = at(cosine_at), *sine = at(sine_at);
    const int group = heads_ / kv_heads_, first = window_ ? std::max(0, position + 1 - window_) : 0;
    const long work = 2L * heads_ * size_ * (position + 1 - first);
#pragma omp parallel for if (work > kShare) schedule(static)
    for (int h = 0; h < kv_heads_; ++h) {
      float* keys = keys_ + static_cast<size_t>(h) * room_ * size_;
      float* values = values_ + static_cast<size_t>(h) * room_ * size_;
      if (k_norm_) normalize(k + h * size_, k_norm_, k + h * size_, size_, eps_);
      rotate(k + h * size_, cosine, sine, turned_);
      std::copy_n(k + h * size_, size_, keys + static_cast<size_t>(position) * size_);
      std::copy_n(v + h * size_, size_, values + static_cast<size_t>(position) * size_);
      for (int g = h * group; g < (h + 1) * group; ++g) {
        float *one = q + g * size_, *scores = scores_.data() + static_cast<size_t>(g) * room_;
        if (q_norm_) normalize(one, q_norm_, one, size_, eps_);
        rotate(one, cosine, sine, turned_);
        const float largest = score(one, keys, scores, first, position + 1, size_, scale_);
        gather(scores, largest, values, out + g * size_, first, position + 1, size_);
      }
    }
  }

 private:
  int heads_, kv_heads_, size_, turned_, room_, window_;
  float scale_, eps_;
  const float *q_norm_, *k_norm_;
  float *keys_, *values_;
  std::vector<float> scores_;
};

}  // namespace

NB_MODULE(_step, m) {
  // hidden += more (unless 0), y = its norm
  m.def("norm", [](uintptr_t hidden, uintptr_t more, uintptr_t weight, uintptr_t y, int n, float eps) {
    if (more) add(at(hidden), at(more), n);
    normalize(at(hidden), at(weight), at(y), n, eps);
  });
  m.def("gate", [](uintptr_t gate, uintptr_t up, uintptr_t out, int n) { gated(at(gate), at(up), at(out), n); });
  nb::class_<Attention>(m, "Attention")
      .def(nb::init<int, int, int, int, int, float, int, uintptr_t, uintptr_t, float, uintptr_t, uintptr_t>())
      .def("step", &Attention::step, nb::call_guard<nb::gil_scoped_release>());
}
