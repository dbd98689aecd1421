// Plain C++ for every processor: whole blocks as compiler vectors, lowered to whatever the target has.
#define POLYBIT_UNROLL  // loops stay loops: without vector registers to fill, unrolling only makes code
#include "kernel.h"

namespace polybit {
namespace {

struct Portable {
  typedef uint32_t Bytes __attribute__((vector_size(kBlockBytes)));
  typedef int32_t Ints __attribute__((vector_size(kBlockBytes)));
  typedef float Floats __attribute__((vector_size(kBlockBytes)));
  static constexpr int rows = 16;
  static constexpr bool panels = false;
  static constexpr int largest = 2;  // tile, as index in kTileSizes
  static constexpr bool wide = true;

  // the same byte in all four places of a word
  static constexpr uint32_t four(int byte) { return 0x01010101u * static_cast<uint32_t>(byte & 0xFF); }

  static POLYBIT_INLINE Bytes load(const uint8_t* p) {
    Bytes a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  static POLYBIT_INLINE Bytes mask(Bytes a, int m) { return a & four(m); }
  // bits of a where m is set, of b elsewhere
  static POLYBIT_INLINE Bytes select(int m, Bytes a, Bytes b) { return (a & four(m)) | (b & four(~m)); }
  static POLYBIT_INLINE Bytes either(Bytes a, Bytes b) { return a ^ b; }
  // shifts run across neighbouring bytes; the selects discard what strays
  template <int n>
  static POLYBIT_INLINE Bytes right(Bytes a) {
    return a >> n;
  }
  template <int n>
  static POLYBIT_INLINE Bytes left(Bytes a) {
    return a << n;
  }

  static POLYBIT_INLINE Ints zero() { return Ints{}; }
  static POLYBIT_INLINE Ints add(Ints a, Ints b) { return a + b; }
  static POLYBIT_INLINE Ints down(Ints a, int n) { return a >> n; }
  static POLYBIT_INLINE Ints dot(Ints sum, Bytes u, const int32_t* codes) {
    const uint32_t word = static_cast<uint32_t>(*codes);
    for (int t = 0; t < 4; ++t)
      sum += (Ints)((u >> (8 * t)) & 0xFFu) * static_cast<int32_t>(static_cast<int8_t>(word >> (8 * t)));
    return sum;
  }

  static POLYBIT_INLINE Floats set(float v) { return Floats{} + v; }
  static POLYBIT_INLINE Floats to_float(Ints a) { return __builtin_convertvector(a, Floats); }
  static POLYBIT_INLINE Floats add(Floats a, Floats b) { return a + b; }
  static POLYBIT_INLINE Floats multiply(Floats a, Floats b) { return a * b; }
  static POLYBIT_INLINE Floats subtract(Floats a, Floats b) { return a - b; }
  // rounded twice: a fused product in software would cost far more than it gains
  static POLYBIT_INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
  static POLYBIT_INLINE Floats load_floats(const float* p) {
    Floats a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  static POLYBIT_INLINE void store(float* p, Floats a) { std::memcpy(p, &a, sizeof a); }
  static POLYBIT_INLINE Floats load_half(const uint16_t* p) {
    Floats a = {};
    for (int i = 0; i < kRows; ++i) a[i] = half_to_float(p[i]);
    return a;
  }
  static POLYBIT_INLINE Floats load_byte(const uint8_t* p) {
    Floats a = {};
    for (int i = 0; i < kRows; ++i) a[i] = static_cast<float>(p[i]);
    return a;
  }
  static POLYBIT_INLINE Floats lookup(const float* table, const uint8_t* index, int) {
    Floats a = {};
    for (int i = 0; i < kRows; ++i) a[i] = table[i < 8 ? index[i] & 15 : index[i - 8] >> 4];
    return a;
  }

  static constexpr int multiply_operations = 128;
  static uint64_t multiply_many(long count) {
    Ints sum = zero();
    const Bytes a = Bytes{} + four(3);
    for (long n = 0; n < count; ++n) {
      const int32_t codes = static_cast<int32_t>(n);
      sum = dot(sum, a, &codes);
    }
    return static_cast<uint32_t>(sum[0]);
  }
};

}  // namespace

const Kernels* portable_kernels() {
  static const Kernels kernels = make_kernels<Portable>("portable");
  return &kernels;
}

}  // namespace polybit
