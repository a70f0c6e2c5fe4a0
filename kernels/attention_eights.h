// What attention multiplies where a register holds eight floats (AVX2). Rows are read where they lie: a score adds up its eight
// lanes in the end, which is less work than to turn keys so that a lane is a key's.
#pragma once
#include "later.h"
#include "native.h"

#include <algorithm>

#if KVASIR_EIGHTS

typedef Half<F16> F8;

// 16 numbers of a row. A shift and a mask make floats of bfloat16, of the even ones and of the odd ones: those stay so, and
// queries and sums of such rows are in that order, too.
static inline F16 row16(const float *p) { return load<F16>(p); }
static inline F16 row16(const bf16 *p) { return unlaced<F16>(p); }

static inline F16 lace(F16 x) {
  auto half = [](__m256 pairs) { return (F8)_mm256_permute4x64_pd((__m256d)pairs, 0xd8); };
  __m256 low = (__m256)x.low, high = (__m256)x.high;
  return {half(_mm256_shuffle_ps(low, high, 0x88)), half(_mm256_shuffle_ps(low, high, 0xdd))};
}

static inline F16 unlace(F16 x) {
  __m256 low = _mm256_unpacklo_ps((__m256)x.low, (__m256)x.high), high = _mm256_unpackhi_ps((__m256)x.low, (__m256)x.high);
  return {(F8)_mm256_permute2f128_ps(low, high, 0x20), (F8)_mm256_permute2f128_ps(low, high, 0x31)};
}

// The sum of each of eight vectors; each in the same order.
static inline F8 sums_of(const F8 *x) {
  __m256 two[4], four[2];
  for (int i = 0; i < 4; i++) {
    __m256 a = (__m256)x[2 * i], b = (__m256)x[2 * i + 1];
    two[i] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 2; i++) {
    __m256 a = two[2 * i], b = two[2 * i + 1];
    four[i] = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  }
  return (F8)_mm256_add_ps(_mm256_permute2f128_ps(four[0], four[1], 0x20), _mm256_permute2f128_ps(four[0], four[1], 0x31));
}

// scores[R], rows `to_row` apart, of q[R] with keys[count]; count is rounded up to eight.
template <int R, class K>
void score_rows(const K *const *keys, int64_t count, const Later &later, const float *const *q, int64_t dim, float *to,
                int64_t to_row) {
  constexpr int G = R == 1 ? 8 : R == 2 ? 4 : 2; // keys at once: as many as it takes that no sum waits for itself
  for (int64_t j = 0; j < count; j += 8) {
    F8 sums[R][8];
    for (int g = 0; g < 8; g += G) {
      F8 s[R][G] = {};
      for (int i = 0; i < G; i++) later.call(j + g + i);
      for (int64_t d = 0; d < dim; d += 16)
        if constexpr (R > 4) { // of floats, half by half: there is a register less than the halves of two keys would take
          for (int64_t e = d; e < d + 16; e += 8) {
            F8 k[G];
            for (int i = 0; i < G; i++) k[i] = load<F8>(keys[j + g + i] + e);
            for (int r = 0; r < R; r++) {
              F8 x = load<F8>(q[r] + e);
              for (int i = 0; i < G; i++) s[r][i] = s[r][i] + x * k[i];
            }
          }
        } else if constexpr (R <= 2) {
          for (int i = 0; i < G; i++) {
            F16 k = row16(keys[j + g + i] + d);
            for (int r = 0; r < R; r++) s[r][i] = s[r][i] + load<F8>(q[r] + d) * k.low;
            for (int r = 0; r < R; r++) s[r][i] = s[r][i] + load<F8>(q[r] + d + 8) * k.high;
          }
        } else {
          F16 k[G];
          for (int i = 0; i < G; i++) k[i] = row16(keys[j + g + i] + d);
          for (int r = 0; r < R; r++) {
            F16 x = load<F16>(q[r] + d);
            for (int i = 0; i < G; i++) s[r][i] = s[r][i] + x.low * k[i].low;
            for (int i = 0; i < G; i++) s[r][i] = s[r][i] + x.high * k[i].high;
          }
        }
      for (int r = 0; r < R; r++)
        for (int i = 0; i < G; i++) sums[r][g + i] = s[r][i];
    }
    for (int r = 0; r < R; r++) store(to + r * to_row + j, sums_of(sums[r]));
  }
}

// to[R], rows `to_row` apart, += weights[R][count] times values[count], from this column on: 16 * C of them. In the n-th of so
// many `passes` the n-th share of rows is called for.
template <int R, int C, class V>
void add_columns(const V *const *values, int64_t count, const Later &later, const float *const *weights, int64_t column,
                 float *to, int64_t to_row, int64_t pass, int64_t passes) {
  F16 s[R][C];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < C; i++) s[r][i] = load<F16>(to + r * to_row + column + 16 * i);
  for (int64_t row = pass * count / passes, j = 0; j < count; row++) {
    if (row < count) later.call(row);
    for (int64_t end = std::min(count, j + passes); j < end; j++)
      for (int i = 0; i < C; i++) {
        F16 v = row16(values[j] + column + 16 * i);
        for (int r = 0; r < R; r++) s[r][i] = s[r][i] + weights[r][j] * v;
      }
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < C; i++) store(to + r * to_row + column + 16 * i, s[r][i]);
}

template <int R, class V>
void add_values(const V *const *values, int64_t count, const Later &later, const float *const *weights, int64_t columns,
                float *to, int64_t to_row) {
  constexpr int C = R == 1 ? 4 : R == 2 ? 2 : 1;
  int64_t whole = columns / (16 * C), passes = whole + columns / 16 % C, pass = 0;
  for (; pass < whole; pass++) add_columns<R, C>(values, count, later, weights, 16 * C * pass, to, to_row, pass, passes);
  if constexpr (C > 1)
    for (; pass < passes; pass++)
      add_columns<R, 1>(values, count, later, weights, 16 * (C * whole + pass - whole), to, to_row, pass, passes);
}

#endif

// From the order of numbers to that in which rows of a cache's type T are read, or back.
template <class T, bool BACK = false>
static inline F16 in_order(F16 x) {
#if KVASIR_EIGHTS
  if constexpr (std::is_same_v<T, bf16>) return BACK ? unlace(x) : lace(x);
#endif
  return x;
}
