// AVX-512 with VNNI: one 64-byte register holds a whole block of 16 rows.
#include "problem.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include <immintrin.h>

#include "kernel.h"

namespace polybit {
namespace {

struct Avx512 {
  using Bytes = __m512i;
  using Ints = __m512i;
  using Floats = __m512;
  static constexpr int rows = 16;
  static constexpr int largest = 3;  // tile, as index in kTileSizes
  static constexpr bool panels = true;
  static constexpr bool wide = true;  // the dot product takes bytes up to 255

  static POLYBIT_INLINE Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static POLYBIT_INLINE Bytes mask(Bytes a, int m) { return _mm512_and_si512(a, _mm512_set1_epi8(static_cast<char>(m))); }
  // bits of a where m is set, of b elsewhere
  static POLYBIT_INLINE Bytes select(int m, Bytes a, Bytes b) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(static_cast<char>(m)), a, b, 0xCA);
  }
  static POLYBIT_INLINE Bytes either(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }
  // shifts run across neighbouring bytes; the selects discard what strays
  template <int n>
  static POLYBIT_INLINE Bytes right(Bytes a) {
    return _mm512_srli_epi16(a, n);
  }
  template <int n>
  static POLYBIT_INLINE Bytes left(Bytes a) {
    return n == 1 ? _mm512_add_epi8(a, a) : _mm512_slli_epi16(a, n);
  }

  static POLYBIT_INLINE Ints zero() { return _mm512_setzero_si512(); }
  static POLYBIT_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static POLYBIT_INLINE Ints down(Ints a, int n) { return _mm512_srai_epi32(a, static_cast<unsigned>(n)); }
  static POLYBIT_INLINE Ints dot(Ints sum, Bytes u, const int32_t* codes) {
    // the broadcast is part of the instruction, which the intrinsic does not tell GCC
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(u), "m"(*codes));
    return sum;
  }
  static POLYBIT_INLINE Ints broadcast(int32_t word) { return _mm512_set1_epi32(word); }
  // in assembly, because GCC 12 copies every accumulator around the intrinsic
  static POLYBIT_INLINE Ints dot_words(Ints sum, Bytes u, Ints words) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(words));
    return sum;
  }
  static POLYBIT_INLINE void store_bytes(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a); }

  static POLYBIT_INLINE Floats set(float v) { return _mm512_set1_ps(v); }
  static POLYBIT_INLINE Floats to_float(Ints a) { return _mm512_cvtepi32_ps(a); }
  static POLYBIT_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static POLYBIT_INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static POLYBIT_INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static POLYBIT_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static POLYBIT_INLINE Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static POLYBIT_INLINE void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
  static POLYBIT_INLINE Floats load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static POLYBIT_INLINE Floats load_byte(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static POLYBIT_INLINE Floats lookup(const float* table, const uint8_t* index, int) {
    const __m256i packed = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(index)));
    const __m512i both =
        _mm512_inserti64x4(_mm512_castsi256_si512(packed), _mm256_srli_epi32(packed, 4), 1);
    return _mm512_permutexvar_ps(both, _mm512_loadu_ps(table));  // uses the low four bits of each index
  }

  static constexpr int multiply_operations = 128;
  static uint64_t multiply_many(long count) {
    Ints sum[12];
    POLYBIT_UNROLL
    for (int i = 0; i < 12; ++i) sum[i] = _mm512_set1_epi32(i);
    const Ints a = _mm512_set1_epi32(static_cast<int>(count)), b = _mm512_set1_epi32(0x01010101);
    for (long n = 0; n < count; n += 12) {
      POLYBIT_UNROLL
      for (int i = 0; i < 12; ++i) sum[i] = _mm512_dpbusd_epi32(sum[i], a, b);
      __asm__ volatile("" ::: "memory");
    }
    int total = 0;
    POLYBIT_UNROLL
    for (int i = 0; i < 12; ++i) total += _mm512_reduce_add_epi32(sum[i]);
    return static_cast<uint64_t>(static_cast<uint32_t>(total));
  }
};

}  // namespace

const Kernels* avx512_kernels() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vnni"))
    return nullptr;
  static const Kernels kernels = make_kernels<Avx512>("avx512");
  return &kernels;
}

}  // namespace polybit
#else
const polybit::Kernels* polybit::avx512_kernels() { return nullptr; }
#endif
