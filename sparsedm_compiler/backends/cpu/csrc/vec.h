// Vectors of the widest width the target has, in plain GCC/Clang vector code.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) || defined(EMULATED_BF16)
#define VEC_BYTES 64
#define VEC_REGISTERS 32
#define ISA_NAME "avx512"
#elif defined(__AVX2__)
#define VEC_BYTES 32
#define VEC_REGISTERS 16
#define ISA_NAME "avx2"
#elif defined(__aarch64__)
#define VEC_BYTES 16
#define VEC_REGISTERS 32
#define ISA_NAME "neon"
#else
#define VEC_BYTES 16
#define VEC_REGISTERS 16
#define ISA_NAME "portable"
#endif

constexpr int L = VEC_BYTES / 4;  // lanes: fp32 values in a vector

typedef float vf __attribute__((vector_size(VEC_BYTES)));
typedef int32_t vi __attribute__((vector_size(VEC_BYTES)));
typedef uint32_t vu __attribute__((vector_size(VEC_BYTES)));
typedef uint16_t vh __attribute__((vector_size(VEC_BYTES / 2)));
typedef uint16_t bf16;

enum Type : int32_t { F32 = 0, BF16 = 1 };

template <class T>
static inline T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
static inline void store(void* p, T v) {
  std::memcpy(p, &v, sizeof v);
}

// The value, loaded once: compilers else fold the load into every multiplication that reads it.
static inline vf in_register(vf v) {
#if defined(EMULATED_BF16)  // its vectors are several registers
#elif defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

static inline vf splat(float x) { return x - vf{}; }  // x - 0 is x, -0 included

static inline vf select(vi mask, vf yes, vf no) {
  return (vf)((mask & (vi)yes) | (~mask & (vi)no));
}

// 1 / x for x from 1 to 1e38, to 2 units in the last place.
static inline vf inverse(vf x) {
#if defined(__AVX512F__)
  const vf y = (vf)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);  // 14 bits; a step of Newton's doubles them
  return y * (splat(2.0f) - x * y);
#else
  return splat(1.0f) / x;
#endif
}

static inline float widen(float x) { return x; }
static inline float widen(bf16 x) {
  const uint32_t bits = (uint32_t)x << 16;
  return load<float>(&bits);
}
static inline vf load_wide(const float* p) { return load<vf>(p); }
static inline vf load_wide(const bf16* p) {
  return (vf)(__builtin_convertvector(load<vh>(p), vu) << 16);
}

// Round to nearest even; NaN stays NaN.
static inline bf16 narrow(float x) {
  const uint32_t bits = load<uint32_t>(&x);
  if (x != x) return (bf16)((bits >> 16) | 64);
  return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline void store_as(float* p, vf v) { store(p, v); }
static inline void store_as(bf16* p, vf v) {
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vu nan = (bits >> 16) | 64;
  const vu is_nan = (vu)(v != v);
  store(p, __builtin_convertvector((is_nan & nan) | (~is_nan & rounded), vh));
}
static inline void put(float* p, float x) { *p = x; }
static inline void put(bf16* p, float x) { *p = narrow(x); }

// One stage of a transpose: swap the off-diagonal S x S blocks of every 2S x 2S block.
template <int S>
static inline void transpose_stage(vf* r) {
  vi low, high;
  for (int i = 0; i < L; i++) {
    const bool second = i & S;
    low[i] = second ? L + (i - S) : i;
    high[i] = second ? L + i : i + S;
  }
  for (int i = 0; i < L; i++) {
    if (i & S) continue;
    const vf a = r[i], b = r[i + S];
#if defined(__clang__)
    vf x, y;
    for (int k = 0; k < L; k++) {
      x[k] = low[k] < L ? a[low[k]] : b[low[k] - L];
      y[k] = high[k] < L ? a[high[k]] : b[high[k] - L];
    }
    r[i] = x;
    r[i + S] = y;
#else
    r[i] = __builtin_shuffle(a, b, low);
    r[i + S] = __builtin_shuffle(a, b, high);
#endif
  }
}

static inline void transpose(vf (&r)[L]) {
  transpose_stage<1>(r);
  transpose_stage<2>(r);
#if VEC_BYTES >= 32
  transpose_stage<4>(r);
#endif
#if VEC_BYTES >= 64
  transpose_stage<8>(r);
#endif
}
