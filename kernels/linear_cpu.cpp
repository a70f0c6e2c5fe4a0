// Products with bfloat16 weights that stay: packed[O / 64][I / 2][64][2], so that 64 outputs take a pair of inputs at once.
// Every output adds its products in the order of the inputs, in float32: how many rows there are changes no bit of it.
#include "native.h"

#if KVASIR_PAIRS

#include <algorithm>

namespace {

constexpr int64_t WIDE = 64;    // outputs in a block
constexpr int64_t ROWS = 6;     // rows whose sums are in registers at once
constexpr int64_t DEEP = 128;   // pairs of inputs in a panel: 32 KiB of weights, which stay in the first cache
constexpr int64_t CHUNK = 384;  // rows for which a panel is read once

thread_local Scratch scratch;

struct Panel {
  const uint32_t *weights;
  int64_t deep;
  const uint32_t *ahead; // what is called for meanwhile, `step` lines with every pair
  int64_t step, lines;
};

// sums[R][64] of x[R] (rows of pairs) with a panel.
template <int R>
void multiply(const uint32_t *x, int64_t x_row, const Panel &p, float *sums, bool add) {
  __m512 s[R][4];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < 4; i++) s[r][i] = add ? _mm512_load_ps(sums + r * WIDE + 16 * i) : _mm512_setzero_ps();
  for (int64_t k = 0; k < p.deep; k++) {
    __m512bh w[4];
    for (int i = 0; i < 4; i++) w[i] = (__m512bh)_mm512_loadu_si512(p.weights + k * WIDE + 16 * i);
    for (int64_t line = k * p.step; line < std::min((k + 1) * p.step, p.lines); line++)
      __builtin_prefetch(p.ahead + 16 * line, 0, 2);
    for (int r = 0; r < R; r++) {
      __m512bh a = (__m512bh)_mm512_set1_epi32((int)x[r * x_row + k]);
      for (int i = 0; i < 4; i++) s[r][i] = _mm512_dpbf16_ps(s[r][i], w[i], a);
    }
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < 4; i++) _mm512_store_ps(sums + r * WIDE + 16 * i, s[r][i]);
}

void multiply(int64_t rows, const uint32_t *x, int64_t x_row, const Panel &p, float *sums, bool add) {
  switch (rows) {
  case 1: return multiply<1>(x, x_row, p, sums, add);
  case 2: return multiply<2>(x, x_row, p, sums, add);
  case 3: return multiply<3>(x, x_row, p, sums, add);
  case 4: return multiply<4>(x, x_row, p, sums, add);
  case 5: return multiply<5>(x, x_row, p, sums, add);
  default: return multiply<6>(x, x_row, p, sums, add);
  }
}

// 64 outputs of up to CHUNK rows.
void block(const uint32_t *x, int64_t x_row, const uint32_t *weights, int64_t pairs, const bf16 *bias, bf16 *out,
           int64_t out_row, int64_t rows) {
  float *sums = (float *)scratch.get(CHUNK * WIDE * 4);
  int64_t deep = rows <= ROWS ? pairs : DEEP, turns = (rows + ROWS - 1) / ROWS;
  for (int64_t k = 0; k < pairs; k += deep) {
    Panel p{weights + k * WIDE, std::min(deep, pairs - k), nullptr, 0, 0};
    p.step = (4 + turns - 1) / turns;
    int64_t lines = std::max<int64_t>(0, std::min(deep, pairs - k - deep)) * 4, done = 0;
    for (int64_t i = 0; i < turns; i++, done += p.deep * p.step) { // as many rows in each as can be: few sums wait for one another
      int64_t r = i * rows / turns, stop = (i + 1) * rows / turns;
      p.ahead = p.weights + (deep * 4 + done) * 16;
      p.lines = std::max<int64_t>(0, std::min(p.deep * p.step, lines - done));
      multiply(stop - r, x + r * x_row + k, x_row, p, sums + r * WIDE, k > 0);
    }
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < WIDE; i += 16) {
      F16 y = load<F16>(sums + r * WIDE + i);
      if (bias) y += widen(bias + i);
      narrow(out + r * out_row + i, y);
    }
}

} // namespace

// weights[O, I] -> packed.
EXPORT void pack_linear(const uint32_t *weights, uint32_t *packed, int64_t outputs, int64_t inputs, int64_t threads) {
  int64_t pairs = inputs / 2;
  share_out(threads, outputs / WIDE, [&](int64_t b) {
    for (int64_t k = 0; k < pairs; k++)
      for (int64_t i = 0; i < WIDE; i++) packed[(b * pairs + k) * WIDE + i] = weights[(b * WIDE + i) * pairs + k];
  });
}

// x[T, I] (rows x_row numbers apart) times packed, plus bias[O] -> out[T, O].
EXPORT void linear(const bf16 *x, int64_t x_row, const uint32_t *packed, const bf16 *bias, bf16 *out, int64_t rows,
                   int64_t inputs, int64_t outputs, int64_t threads) {
  int64_t blocks = outputs / WIDE, pairs = inputs / 2, chunks = (rows + CHUNK - 1) / CHUNK;
  share_out(threads, blocks * chunks, [&](int64_t i) {
    int64_t b = i % blocks, first = i / blocks * CHUNK;
    block((const uint32_t *)x + first * (x_row / 2), x_row / 2, packed + b * pairs * WIDE, pairs,
          bias ? bias + b * WIDE : nullptr, out + first * outputs + b * WIDE, outputs, std::min(CHUNK, rows - first));
  });
}

EXPORT int64_t multiplies_pairs() { return 1; }

#else

EXPORT void pack_linear(const uint32_t *, uint32_t *, int64_t, int64_t, int64_t) {}
EXPORT void linear(const bf16 *, int64_t, const uint32_t *, const bf16 *, bf16 *, int64_t, int64_t, int64_t, int64_t) {}
EXPORT int64_t multiplies_pairs() { return 0; }

#endif
