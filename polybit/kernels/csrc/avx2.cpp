// AVX2, and – compiled a second time with POLYBIT_VNNI – AVX2 with the VNNI dot product: 8 rows of a block at a time.
#include "problem.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <cpuid.h>
#include <immintrin.h>

#include "kernel.h"

namespace polybit {
namespace {

struct Avx2 {
  using Bytes = __m256i;
  using Ints = __m256i;
  using Floats = __m256;
  static constexpr int rows = 8;
  static constexpr bool panels = false;
  static constexpr int largest = 3;  // tile, as index in kTileSizes

  static POLYBIT_INLINE Bytes load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static POLYBIT_INLINE Bytes mask(Bytes a, int m) { return _mm256_and_si256(a, _mm256_set1_epi8(static_cast<char>(m))); }
  // bits of a where m is set, of b elsewhere
  static POLYBIT_INLINE Bytes select(int m, Bytes a, Bytes b) {
    const Bytes chosen = _mm256_and_si256(_mm256_set1_epi8(static_cast<char>(m)), _mm256_xor_si256(a, b));
    return _mm256_xor_si256(b, chosen);
  }
  static POLYBIT_INLINE Bytes either(Bytes a, Bytes b) { return _mm256_xor_si256(a, b); }
  // shifts run across neighbouring bytes; the selects discard what strays
  template <int n>
  static POLYBIT_INLINE Bytes right(Bytes a) {
    return _mm256_srli_epi16(a, n);
  }
  template <int n>
  static POLYBIT_INLINE Bytes left(Bytes a) {
    return n == 1 ? _mm256_add_epi8(a, a) : _mm256_slli_epi16(a, n);
  }

  static POLYBIT_INLINE Ints zero() { return _mm256_setzero_si256(); }
  static POLYBIT_INLINE Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  static POLYBIT_INLINE Ints down(Ints a, int n) { return _mm256_srai_epi32(a, n); }
#if defined(POLYBIT_VNNI)
  static constexpr bool wide = true;  // the dot product takes bytes up to 255
  static POLYBIT_INLINE Ints dot(Ints sum, Bytes u, const int32_t* codes) {
    return _mm256_dpbusd_epi32(sum, u, _mm256_set1_epi32(*codes));
  }
#else
  static constexpr bool wide = false;
  // sum += 2^shift * (eight groups of four columns); eight pairs of a nibble and a code fit 16 bits: 8*2*15*127 < 2^15
  template <int shift>
  static POLYBIT_INLINE Ints dot_nibbles(Ints sum, const Bytes* u, const int32_t* codes, int stride) {
    Ints pairs = _mm256_maddubs_epi16(u[0], _mm256_set1_epi32(codes[0]));
    POLYBIT_UNROLL
    for (int i = 1; i < 8; ++i)
      pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(u[i], _mm256_set1_epi32(codes[i * stride])));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1 << shift)));
  }
#endif

  static POLYBIT_INLINE Floats set(float v) { return _mm256_set1_ps(v); }
  static POLYBIT_INLINE Floats to_float(Ints a) { return _mm256_cvtepi32_ps(a); }
  static POLYBIT_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static POLYBIT_INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static POLYBIT_INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static POLYBIT_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static POLYBIT_INLINE Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static POLYBIT_INLINE void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
  static POLYBIT_INLINE Floats load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static POLYBIT_INLINE Floats load_byte(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static POLYBIT_INLINE Floats lookup(const float* table, const uint8_t* index, int part) {
    const __m256i packed = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(index)));
    const __m256i mine = part ? _mm256_srli_epi32(packed, 4) : _mm256_and_si256(packed, _mm256_set1_epi32(15));
    return _mm256_i32gather_ps(table, mine, 4);
  }

  static constexpr int multiply_operations = 64;
  static uint64_t multiply_many(long count) {
    Ints sum[12];
    POLYBIT_UNROLL
    for (int i = 0; i < 12; ++i) sum[i] = _mm256_set1_epi32(i);
    const Ints a = _mm256_set1_epi32(static_cast<int>(count)), b = _mm256_set1_epi32(0x01010101);
    for (long n = 0; n < count; n += 12) {
      POLYBIT_UNROLL
      for (int i = 0; i < 12; ++i) {
#if defined(POLYBIT_VNNI)
        sum[i] = _mm256_dpbusd_epi32(sum[i], a, b);
#else
        sum[i] = _mm256_add_epi16(sum[i], _mm256_maddubs_epi16(a, b));
#endif
      }
      __asm__ volatile("" ::: "memory");
    }
    uint32_t total = 0;
    POLYBIT_UNROLL
    for (int i = 0; i < 12; ++i) total += static_cast<uint32_t>(_mm256_extract_epi32(sum[i], 0));
    return total;
  }
};

bool has_avx2() {
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;  // GCC 10 does not know "f16c"
  const bool halves = __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && halves;
}

}  // namespace

#if defined(POLYBIT_VNNI)
const Kernels* avxvnni_kernels() {
#if defined(__AVXVNNI__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool vnni = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
#else  // compiled to the AVX-512 form of the same instructions
  const bool vnni = __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#endif
  if (!has_avx2() || !vnni) return nullptr;
  static const Kernels kernels = make_kernels<Avx2>("avxvnni");
  return &kernels;
}
#else
const Kernels* avx2_kernels() {
  if (!has_avx2()) return nullptr;
  static const Kernels kernels = make_kernels<Avx2>("avx2");
  return &kernels;
}
#endif

}  // namespace polybit
#elif defined(POLYBIT_VNNI)
const polybit::Kernels* polybit::avxvnni_kernels() { return nullptr; }
#else
const polybit::Kernels* polybit::avx2_kernels() { return nullptr; }
#endif
