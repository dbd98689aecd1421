// The few Arm vector operations of csrc/neon.cpp in plain C++, so that its arithmetic is tested on any processor.
#pragma once
#include <cstdint>
#include <cstring>

typedef uint8_t uint8x16_t __attribute__((vector_size(16)));
typedef int8_t int8x16_t __attribute__((vector_size(16)));
typedef int32_t int32x4_t __attribute__((vector_size(16)));
typedef float float32x4_t __attribute__((vector_size(16)));
struct uint16x4_t {
  uint16_t lane[4];
};
struct float16x4_t {
  uint16_t lane[4];
};

namespace polybit {
static inline float half_to_float(uint16_t);
}

static inline uint8x16_t vld1q_u8(const uint8_t* p) {
  uint8x16_t a;
  std::memcpy(&a, p, 16);
  return a;
}
static inline float32x4_t vld1q_f32(const float* p) {
  float32x4_t a;
  std::memcpy(&a, p, 16);
  return a;
}
static inline uint16x4_t vld1_u16(const uint16_t* p) {
  uint16x4_t a;
  std::memcpy(&a, p, 8);
  return a;
}
static inline void vst1q_f32(float* p, float32x4_t a) { std::memcpy(p, &a, 16); }
static inline uint8x16_t vdupq_n_u8(uint8_t v) { return uint8x16_t{} + v; }
static inline int8x16_t vdupq_n_s8(int8_t v) { return int8x16_t{} + v; }
static inline int32x4_t vdupq_n_s32(int32_t v) { return int32x4_t{} + v; }
static inline float32x4_t vdupq_n_f32(float v) { return float32x4_t{} + v; }
static inline uint8x16_t vandq_u8(uint8x16_t a, uint8x16_t b) { return a & b; }
static inline uint8x16_t veorq_u8(uint8x16_t a, uint8x16_t b) { return a ^ b; }
static inline uint8x16_t vbslq_u8(uint8x16_t m, uint8x16_t a, uint8x16_t b) { return (a & m) | (b & ~m); }
#define vshrq_n_u8(a, n) ((a) >> (n))
#define vshlq_n_u8(a, n) ((a) << (n))
#define vshlq_n_s32(a, n) ((a) * (1 << (n)))
static inline int32x4_t vshlq_s32(int32x4_t a, int32x4_t n) { return n[0] < 0 ? a >> -n : a << n; }
static inline int32x4_t vaddq_s32(int32x4_t a, int32x4_t b) { return a + b; }
static inline float32x4_t vaddq_f32(float32x4_t a, float32x4_t b) { return a + b; }
static inline float32x4_t vsubq_f32(float32x4_t a, float32x4_t b) { return a - b; }
static inline float32x4_t vmulq_f32(float32x4_t a, float32x4_t b) { return a * b; }
static inline float32x4_t vfmaq_f32(float32x4_t c, float32x4_t a, float32x4_t b) { return a * b + c; }
static inline float32x4_t vcvtq_f32_s32(int32x4_t a) { return __builtin_convertvector(a, float32x4_t); }
static inline int8x16_t vreinterpretq_s8_u8(uint8x16_t a) { return (int8x16_t)a; }
static inline int8x16_t vreinterpretq_s8_s32(int32x4_t a) { return (int8x16_t)a; }
static inline float16x4_t vreinterpret_f16_u16(uint16x4_t a) {
  float16x4_t b;
  std::memcpy(&b, &a, 8);
  return b;
}
static inline float32x4_t vcvt_f32_f16(float16x4_t a) {
  float32x4_t b = {};
  for (int i = 0; i < 4; ++i) b[i] = polybit::half_to_float(a.lane[i]);
  return b;
}
static inline int32x4_t vdotq_s32(int32x4_t sum, int8x16_t a, int8x16_t b) {
  for (int i = 0; i < 16; ++i) sum[i / 4] += a[i] * b[i];
  return sum;
}
#define vgetq_lane_s32(a, n) ((a)[n])
