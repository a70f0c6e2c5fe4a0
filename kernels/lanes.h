// 16 numbers of 32 bits at once. Where a register holds them (AVX-512) they are one of the compiler's own vectors; elsewhere
// halves of halves, until one is held (AVX2; NEON, SSE): gcc keeps a vector that no register holds in memory, which made a
// product a hundred times slower. All is written for both: `where` for ?:, `as` and `convert` for casts.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
#define KVASIR_EIGHTS 1 // halves are AVX2's
#else
#define KVASIR_EIGHTS 0
#endif

#if defined(__AVX512F__)
constexpr int REGISTER = 64; // bytes
#elif KVASIR_EIGHTS
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif

template <class H>
struct Halves {
  H low, high;
  auto operator[](int i) const { return i < (int)sizeof(H) / 4 ? low[i] : high[i - (int)sizeof(H) / 4]; }
};
template <class V>
constexpr bool halved = false;
template <class H>
constexpr bool halved<Halves<H>> = true;
template <class V>
using Half = decltype(V::low);

template <class T, int N>
struct Vector {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N, bool HELD = (N * sizeof(T) <= REGISTER)>
struct Lanes : Vector<T, N> {};
template <class T, int N>
struct Lanes<T, N, false> {
  typedef Halves<typename Lanes<T, N / 2>::type> type;
};
typedef Lanes<float, 16>::type F16;
typedef Lanes<int32_t, 16>::type I16;
typedef Lanes<uint32_t, 16>::type U16;

// The same bits.
template <class To, class From>
static inline To as(From x) {
  if constexpr (halved<To>)
    return {as<Half<To>>(x.low), as<Half<To>>(x.high)};
  else
    return (To)x;
}

// The same numbers.
template <class To, class From>
static inline To convert(From x) {
  if constexpr (halved<To>)
    return {convert<Half<To>>(x.low), convert<Half<To>>(x.high)};
  else
    return __builtin_convertvector(x, To);
}

template <class V, class P>
static inline V load(const P *p) {
  if constexpr (halved<V>) {
    return {load<Half<V>>(p), load<Half<V>>((const char *)p + sizeof(V) / 2)};
  } else {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
}

template <class V, class P>
static inline void store(P *p, V v) {
  if constexpr (halved<V>)
    store(p, v.low), store((char *)p + sizeof(V) / 2, v.high);
  else
    std::memcpy(p, &v, sizeof v);
}

// Numbers of another type, converted. gcc takes several instructions for one of AVX2.
template <class V, class P>
static inline V load_as(const P *p) {
  if constexpr (halved<V>)
    return {load_as<Half<V>>(p), load_as<Half<V>>(p + sizeof(V) / 8)};
#if KVASIR_EIGHTS
  else if constexpr (std::is_same_v<P, uint16_t>)
    return (V)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
  else if constexpr (std::is_same_v<P, uint8_t>)
    return (V)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
  else if constexpr (std::is_same_v<P, int8_t>)
    return (V)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#endif
  else
    return __builtin_convertvector(load<typename Vector<P, sizeof(V) / 4>::type>(p), V);
}

template <class P, class V>
static inline void store_as(P *p, V v) {
  if constexpr (halved<V>)
    store_as(p, v.low), store_as(p + sizeof(V) / 8, v.high);
#if KVASIR_EIGHTS
  else if constexpr (std::is_same_v<P, uint16_t>)
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1)));
#endif
  else
    store(p, __builtin_convertvector(v, typename Vector<P, sizeof(V) / 4>::type));
}

template <class M, class V>
static inline V where(M mask, V a, V b) {
  if constexpr (halved<V>)
    return {where(mask.low, a.low, b.low), where(mask.high, a.high, b.high)};
  else
    return mask ? a : b;
}

template <class S>
using Scalar = std::enable_if_t<std::is_arithmetic_v<S>>;

#define BY_HALVES(op)                                                                                                      \
  template <class H>                                                                                                       \
  static inline auto operator op(Halves<H> a, Halves<H> b)->Halves<decltype(a.low op b.low)> {                             \
    return {a.low op b.low, a.high op b.high};                                                                             \
  }                                                                                                                        \
  template <class H, class S, class = Scalar<S>>                                                                           \
  static inline auto operator op(Halves<H> a, S b)->Halves<decltype(a.low op b)> {                                         \
    return {a.low op b, a.high op b};                                                                                      \
  }                                                                                                                        \
  template <class H, class S, class = Scalar<S>>                                                                           \
  static inline auto operator op(S a, Halves<H> b)->Halves<decltype(a op b.low)> {                                         \
    return {a op b.low, a op b.high};                                                                                      \
  }
#define ONTO_HALVES(op)                                                                                                    \
  BY_HALVES(op)                                                                                                            \
  template <class H, class S>                                                                                              \
  static inline Halves<H> &operator op##=(Halves<H> &a, S b) {                                                             \
    return a = a op b;                                                                                                     \
  }
ONTO_HALVES(+)
ONTO_HALVES(-)
ONTO_HALVES(*)
ONTO_HALVES(/)
ONTO_HALVES(&)
ONTO_HALVES(|)
ONTO_HALVES(<<)
ONTO_HALVES(>>)
BY_HALVES(<)
BY_HALVES(>)
BY_HALVES(<=)
BY_HALVES(>=)
BY_HALVES(==)
BY_HALVES(!=)
#undef BY_HALVES
#undef ONTO_HALVES
template <class H>
static inline Halves<H> operator~(Halves<H> a) {
  return {~a.low, ~a.high};
}
template <class H>
static inline Halves<H> operator-(Halves<H> a) {
  return {-a.low, -a.high};
}
