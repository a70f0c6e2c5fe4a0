// What the C++ sources of the CPU kernels share: number types, 16 floats at once, torch's own threads.
// Compiled by native.py with -march=native: the vector type is as wide as the CPU allows, intrinsics only where they pay.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdlib>

#include "lanes.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define KVASIR_PAIRS 1 // products of bfloat16 pairs, summed in float32
#else
#define KVASIR_PAIRS 0
#endif

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct int8 {
  int8_t number;
};
template <int MANTISSA> // float8_e4m3fn (3) and float8_e5m2 (2)
struct fp8 {
  uint8_t bits;
  static constexpr int BIAS = (1 << (6 - MANTISSA)) - 1;
};
typedef fp8<3> e4m3;
typedef fp8<2> e5m2;
// Types by their numbers in native.py; those of 8 bits have a scale for every row.
enum Type { FLOAT32, BFLOAT16, FLOAT16, INT8, E4M3, E5M2 };
template <class T>
constexpr bool scaled = sizeof(T) == 1;
template <class T>
constexpr float most = 0.0f; // the largest number
template <>
constexpr float most<int8> = 127.0f;
template <>
constexpr float most<e4m3> = 448.0f;
template <>
constexpr float most<e5m2> = 57344.0f;

// Where keys and values lie: a slot's head is a row. Strides are in numbers of the type, those of scales in floats.
struct Cache {
  int64_t type;
  void *k, *v; // v null: values are the first numbers of the keys
  float *k_scales, *v_scales;
  int64_t block, slot, head, scale_block, scale_slot, scale_head, block_size;
};

static inline F16 splat(float x) { return F16{} + x; }

static inline I16 splat_bits(uint32_t bits) { return I16{} + (int32_t)bits; }

static inline I16 places() { // of numbers among 16
  static constexpr int32_t found[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load<I16>(found);
}

static inline float scalar(float x) { return x; }

static inline float scalar(bf16 x) {
  uint32_t u = (uint32_t)x.bits << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

static inline float scalar(fp16 x) {
  uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff, u;
  if (rest >= 0x7c00)
    u = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  else if (rest >= 0x400)
    u = sign | ((rest << 13) + (112u << 23));
  else {
    float f = (float)rest * 0x1p-24f; // subnormal
    std::memcpy(&u, &f, 4);
    u |= sign;
  }
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

static inline F16 widen(const float *p) { return load<F16>(p); }

static inline F16 widen(const bf16 *p) { return as<F16>(load_as<U16>((const uint16_t *)p) << 16); }

// Register by register the first of each two numbers, then the second: a shift makes floats of the ones and a mask of the others.
template <class V>
static inline V unlaced(const bf16 *p) {
  if constexpr (sizeof(V) > 2 * REGISTER) {
    return {unlaced<Half<V>>(p), unlaced<Half<V>>(p + sizeof(V) / 8)};
  } else {
    auto both = load<typename Vector<uint32_t, REGISTER / 4>::type>(p);
    return {(Half<V>)(both << 16), (Half<V>)(both & 0xffff0000)};
  }
}

static inline F16 widen(const fp16 *p) {
#if defined(__AVX512F__)
  return (F16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif KVASIR_EIGHTS && defined(__F16C__)
  auto half = [&](int i) { return (Half<F16>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + i))); };
  return {half(0), half(8)};
#else
  float found[16];
  for (int i = 0; i < 16; i++) found[i] = scalar(p[i]);
  return load<F16>(found);
#endif
}

static inline F16 widen(const int8 *p) {
#if defined(__AVX512F__)
  return (F16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#else
  return convert<F16>(load_as<I16>((const int8_t *)p));
#endif
}

// The bits fall into place in a float whose exponent is too small by a constant; subnormals too.
template <int M>
static inline F16 widen(const fp8<M> *p) {
#if defined(__AVX512F__)
  U16 u = (U16)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#else
  U16 u = load_as<U16>((const uint8_t *)p);
#endif
  U16 sign = (u & 0x80) << 24, rest = (u & 0x7f) << (23 - M);
  F16 size = as<F16>(rest) * std::ldexp(1.0f, 127 - fp8<M>::BIAS);
  return as<F16>(as<U16>(size) | sign);
}

static inline void narrow(float *p, F16 x) { store(p, x); }

// To the nearest even; a NaN stays one.
#if KVASIR_PAIRS
typedef Vector<uint16_t, 16>::type W16;
static inline W16 rounded(F16 x) { return (W16)_mm512_cvtneps_pbh((__m512)x); }
static inline void narrow(bf16 *p, F16 x) { store(p, rounded(x)); }
static inline F16 rounded_to_bf16(F16 x) { return (F16)(convert<U16>(rounded(x)) << 16); }
#else
static inline U16 rounded(F16 x) { // in the upper halves
  U16 u = as<U16>(x);
  U16 near = u + 0x7fff + (u >> 16 & 1);
  return where(x == x, near, u | 0x400000) & 0xffff0000;
}
static inline void narrow(bf16 *p, F16 x) { store_as((uint16_t *)p, rounded(x) >> 16); }
static inline F16 rounded_to_bf16(F16 x) { return as<F16>(rounded(x)); }
#endif

// Numbers up to most<T>: to the nearest even.
static inline void narrow(int8 *p, F16 x) {
  I16 near = as<I16>(x + 12582912.0f) - 0x4b400000; // 1.5 * 2^23: rounds to an integer
  store_as((int8_t *)p, near);
}

template <int M>
static inline void narrow(fp8<M> *p, F16 x) {
  constexpr int SHIFT = 23 - M, BIAS = fp8<M>::BIAS;
  U16 u = as<U16>(x), sign = u >> 24 & 0x80, size = u & 0x7fffffff;
  U16 normal = ((size + ((1u << (SHIFT - 1)) - 1) + (size >> SHIFT & 1)) >> SHIFT) - ((127u - BIAS) << M);
  F16 unit = splat(std::ldexp(1.0f, 24 - BIAS - M)); // a sum with it rounds where a subnormal ends
  U16 small = as<U16>(as<F16>(size) + unit) - as<U16>(unit);
  store_as((uint8_t *)p, sign | where(size < (uint32_t)(128 - BIAS) << 23, small, normal));
}

static inline uint16_t half_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  uint32_t sign = u >> 16 & 0x8000, size = u & 0x7fffffff;
  if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00); // rounds to infinity
  if (size < 0x38800000) {                                  // subnormal: the sum rounds where a half ends
    float g;
    std::memcpy(&g, &size, 4);
    g += 0.5f;
    std::memcpy(&size, &g, 4);
    return (uint16_t)(sign | (size - 0x3f000000));
  }
  return (uint16_t)(sign | ((size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13));
}

static inline void narrow(fp16 *p, F16 x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif KVASIR_EIGHTS && defined(__F16C__)
  auto half = [](auto h) { return _mm256_cvtps_ph((__m256)h, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); };
  _mm_storeu_si128((__m128i *)p, half(x.low)), _mm_storeu_si128((__m128i *)(p + 8), half(x.high));
#else
  for (int i = 0; i < 16; i++) p[i].bits = half_of(x[i]);
#endif
}

// The same for the first n of 16.
template <class T>
static inline F16 widen(const T *p, int64_t n) {
  if (n >= 16) return widen(p);
  T part[16] = {};
  std::memcpy(part, p, n * sizeof(T));
  return widen(part);
}

template <class T>
static inline void narrow(T *p, F16 x, int64_t n) {
  if (n >= 16) return narrow(p, x);
  T part[16];
  narrow(part, x);
  std::memcpy(p, part, n * sizeof(T));
}

static inline float sum(F16 x) { // by halves: a fixed order
  float part[16];
  store(part, x);
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; i++) part[i] += part[i + n];
  return part[0];
}

// A NaN in b comes through.
static inline F16 larger(F16 a, F16 b) {
#ifdef __AVX512F__
  return (F16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return where(a > b, a, b);
#endif
}

static inline F16 smaller(F16 a, F16 b) {
#ifdef __AVX512F__
  return (F16)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return where(a < b, a, b);
#endif
}

static inline float largest(F16 x) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)x);
#elif KVASIR_EIGHTS
  __m256 eight = _mm256_max_ps((__m256)x.low, (__m256)x.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
  float part[16];
  store(part, x);
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; i++) part[i] = part[i] > part[i + n] ? part[i] : part[i + n];
  return part[0];
#endif
}

#ifdef __AVX512F__
#define INLINE
#else
#define INLINE __attribute__((always_inline)) // halves would be handed over in memory
#endif

// e^x to 2 units in the last place (Cephes' polynomial); below -87 zero, e^0 is 1 exactly.
static inline INLINE F16 exponential(F16 x) {
  I16 tiny = x < -87.0f;
  x = smaller(splat(88.0f), larger(splat(-87.0f), x));
  F16 n = x * 1.44269504f + 12582912.0f; // 1.5 * 2^23: rounds to an integer
  I16 power = as<I16>(n) - 0x4b400000;
  n -= 12582912.0f;
  x = x - n * 0.693359375f - n * -2.12194440e-4f;
  F16 y = splat(1.9875691500e-4f);
  y = y * x + 1.3981999507e-3f;
  y = y * x + 8.3334519073e-3f;
  y = y * x + 4.1665795894e-2f;
  y = y * x + 1.6666665459e-1f;
  y = y * x + 5.0000001201e-1f;
  y = y * x * x + x + 1.0f;
  y = y * as<F16>((power + 127) << 23);
  return where(tiny, splat(0.0f), y);
}

static inline F16 tangent(F16 x) { // hyperbolic
  F16 e = exponential(x * 2.0f);
  return 1.0f - 2.0f / (e + 1.0f);
}

#ifdef __AVX512F__
// 16 rows of 16 numbers of 32 bits.
static inline __attribute__((always_inline)) void transpose(__m512 *r) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = (__m512)_mm512_unpacklo_pd((__m512d)t[i + j], (__m512d)t[i + j + 2]);
      r[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd((__m512d)t[i + j], (__m512d)t[i + j + 2]);
    }
  for (int j = 0; j < 4; j++) {
    t[j] = _mm512_shuffle_f32x4(r[j], r[j + 4], 0x88), t[j + 4] = _mm512_shuffle_f32x4(r[j], r[j + 4], 0xdd);
    t[j + 8] = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0x88), t[j + 12] = _mm512_shuffle_f32x4(r[j + 8], r[j + 12], 0xdd);
  }
  for (int j = 0; j < 8; j++) {
    r[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd);
  }
}
#endif

// -- threads: the pool of the OpenMP library that torch brought, so that two pools never spin against each other

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
typedef int (*Number)();
extern Parallel start_parallel;
extern Number thread_number, thread_count;

// run(thread, threads) on at most so many threads.
template <class Run>
static inline void parallel(int64_t threads, Run run) {
  if (threads <= 1 || !start_parallel) return run(0, 1);
  start_parallel([](void *p) { (*(Run *)p)(thread_number(), thread_count()); }, &run, (unsigned)threads, 0);
}

// run(i) for i below count, each taken by the thread that is free first.
template <class Run>
static inline void share_out(int64_t threads, int64_t count, Run run) {
  std::atomic<int64_t> next{0};
  parallel(threads < count ? threads : count, [&](int, int) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) run(i);
  });
}

// The same in runs of neighbours, long ones first: what is read one after the other lies together. Each thread has its run of
// `make`.
template <class Make>
static inline void share_runs(int64_t threads, int64_t count, Make make) {
  std::atomic<int64_t> next{0};
  parallel(threads < count ? threads : count, [&](int, int all) {
    auto run = make();
    for (int64_t at = next.load(std::memory_order_relaxed); at < count;) {
      int64_t few = (count - at) / (2 * all), stop = at + (few < 1 ? 1 : few);
      if (!next.compare_exchange_weak(at, stop, std::memory_order_relaxed)) continue;
      while (at < stop) run(at++);
      at = next.load(std::memory_order_relaxed);
    }
  });
}

// Memory of one thread that lives from call to call: aligned, never smaller than asked.
struct Scratch {
  char *memory = nullptr;
  size_t size = 0;
  void *get(size_t bytes) {
    if (bytes > size) {
      std::free(memory);
      size = (bytes + 4095) / 4096 * 4096;
      memory = (char *)std::aligned_alloc(64, size);
      if (!memory) std::abort();
    }
    return memory;
  }
  ~Scratch() { std::free(memory); }
};

#define EXPORT extern "C" __attribute__((visibility("default")))
