// 64-bit Arm with the dot product extension: four rows of a block at a time.
#include "problem.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include "kernel.h"

namespace polybit {
namespace {

struct Neon {
  using Bytes = uint8x16_t;
  using Ints = int32x4_t;
  using Floats = float32x4_t;
  static constexpr int rows = 4;
  static constexpr bool panels = false;
  static constexpr int largest = 3;  // tile, as index in kTileSizes
  static constexpr bool wide = false;  // sdot takes signed bytes: codes are fed as nibbles

  static POLYBIT_INLINE Bytes load(const uint8_t* p) { return vld1q_u8(p); }
  static POLYBIT_INLINE Bytes mask(Bytes a, int m) { return vandq_u8(a, vdupq_n_u8(static_cast<uint8_t>(m))); }
  // bits of a where m is set, of b elsewhere
  static POLYBIT_INLINE Bytes select(int m, Bytes a, Bytes b) {
    return vbslq_u8(vdupq_n_u8(static_cast<uint8_t>(m)), a, b);
  }
  static POLYBIT_INLINE Bytes either(Bytes a, Bytes b) { return veorq_u8(a, b); }
  template <int n>
  static POLYBIT_INLINE Bytes right(Bytes a) {
    return vshrq_n_u8(a, n);
  }
  template <int n>
  static POLYBIT_INLINE Bytes left(Bytes a) {
    return vshlq_n_u8(a, n);
  }

  static POLYBIT_INLINE Ints zero() { return vdupq_n_s32(0); }
  static POLYBIT_INLINE Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
  static POLYBIT_INLINE Ints down(Ints a, int n) { return vshlq_s32(a, vdupq_n_s32(-n)); }
  template <int shift>
  static POLYBIT_INLINE Ints dot_nibbles(Ints sum, const Bytes* u, const int32_t* codes, int stride) {
    Ints part = zero();
    POLYBIT_UNROLL
    for (int i = 0; i < 8; ++i)
      part = vdotq_s32(part, vreinterpretq_s8_u8(u[i]), vreinterpretq_s8_s32(vdupq_n_s32(codes[i * stride])));
    return vaddq_s32(sum, vshlq_n_s32(part, shift));
  }

  static POLYBIT_INLINE Floats set(float v) { return vdupq_n_f32(v); }
  static POLYBIT_INLINE Floats to_float(Ints a) { return vcvtq_f32_s32(a); }
  static POLYBIT_INLINE Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
  static POLYBIT_INLINE Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
  static POLYBIT_INLINE Floats subtract(Floats a, Floats b) { return vsubq_f32(a, b); }
  static POLYBIT_INLINE Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static POLYBIT_INLINE Floats load_floats(const float* p) { return vld1q_f32(p); }
  static POLYBIT_INLINE void store(float* p, Floats a) { vst1q_f32(p, a); }
  static POLYBIT_INLINE Floats load_half(const uint16_t* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
  }
  static POLYBIT_INLINE Floats load_byte(const uint8_t* p) {
    const float value[4] = {float(p[0]), float(p[1]), float(p[2]), float(p[3])};
    return vld1q_f32(value);
  }
  static POLYBIT_INLINE Floats lookup(const float* table, const uint8_t* index, int part) {
    float value[4];
    for (int r = 0; r < 4; ++r) {
      const uint8_t packed = index[(part % 2) * 4 + r];
      value[r] = table[part < 2 ? packed & 15 : packed >> 4];
    }
    return vld1q_f32(value);
  }

  static constexpr int multiply_operations = 32;
  static uint64_t multiply_many(long count) {
    Ints sum[12];
    POLYBIT_UNROLL
    for (int i = 0; i < 12; ++i) sum[i] = vdupq_n_s32(i);
    const int8x16_t a = vdupq_n_s8(static_cast<int8_t>(count)), b = vdupq_n_s8(1);
    for (long n = 0; n < count; n += 12) {
      POLYBIT_UNROLL
      for (int i = 0; i < 12; ++i) sum[i] = vdotq_s32(sum[i], a, b);
      __asm__ volatile("" ::: "memory");
    }
    uint32_t total = 0;
    POLYBIT_UNROLL
    for (int i = 0; i < 12; ++i) total += static_cast<uint32_t>(vgetq_lane_s32(sum[i], 0));
    return total;
  }
};

bool has_dot_product() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & (1u << 20)) != 0;  // HWCAP_ASIMDDP
#else
  return true;  // every Apple processor with 64 bits that runs a current system
#endif
}

}  // namespace

const Kernels* neon_kernels() {
  if (!has_dot_product()) return nullptr;
  static const Kernels kernels = make_kernels<Neon>("neon");
  return &kernels;
}

}  // namespace polybit
#else
const polybit::Kernels* polybit::neon_kernels() { return nullptr; }
#endif
