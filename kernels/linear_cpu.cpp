// Products with weights that stay, packed so that 64 outputs take an input at once: [O / 64][I][64], or where the CPU
// multiplies pairs of bfloat16 [O / 64][I / 2][64][2]; the last block is filled up with zeros. Every output adds its products
// in the order of the inputs, in float32: how many rows there are changes no bit of it.
#include "native.h"

#include <algorithm>

namespace {

constexpr int64_t WIDE = 64;   // outputs in a block
constexpr int64_t CHUNK = 384; // rows for which a panel is read once
#ifdef __AVX512F__
constexpr int64_t ROWS = 6; // rows whose sums are in registers at once,
constexpr int COLUMNS = 4;  // each with so many vectors of 16
#else
constexpr int64_t ROWS = 3;
constexpr int COLUMNS = 2;
#endif

thread_local Scratch scratch, inputs_wide;

#if KVASIR_PAIRS
// Weights and rows as pairs, one pair of each in 32 bits.
struct Pairs {
  typedef uint32_t Weight;
  typedef uint32_t Input;
  typedef bf16 Number;
  static constexpr int64_t DEEP = 128; // in a panel: 32 KiB of weights, which stay in the first cache
  static F16 product(F16 sum, F16 w, uint32_t x) {
    return (F16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)x));
  }
  static F16 weights(const uint32_t *p) { return load<F16>(p); }
};
#endif

template <class T>
struct Singles {
  typedef T Weight;
  typedef float Input;
  typedef T Number;
  static constexpr int64_t DEEP = 128;
  static F16 product(F16 sum, F16 w, float x) { return sum + w * x; }
  static F16 weights(const T *p) { return widen(p); }
};

template <class Kind>
struct Panel {
  const typename Kind::Weight *weights;
  int64_t deep;
  const char *ahead; // what is called for meanwhile, `step` lines with every input
  int64_t step, lines;
};

// sums[R][64] of x[R] with a panel.
template <class Kind, int R>
void multiply(const typename Kind::Input *x, int64_t x_row, const Panel<Kind> &p, float *sums, bool add) {
  for (int c = 0; c < 4; c += COLUMNS) {
    F16 s[R][COLUMNS];
    for (int r = 0; r < R; r++)
      for (int i = 0; i < COLUMNS; i++) s[r][i] = add ? load<F16>(sums + r * WIDE + 16 * (c + i)) : splat(0.0f);
    for (int64_t k = 0; k < p.deep; k++) {
      F16 w[COLUMNS];
      for (int i = 0; i < COLUMNS; i++) w[i] = Kind::weights(p.weights + k * WIDE + 16 * (c + i));
      if (!c)
        for (int64_t line = k * p.step; line < std::min((k + 1) * p.step, p.lines); line++)
          __builtin_prefetch(p.ahead + 64 * line, 0, 2);
      for (int r = 0; r < R; r++)
        for (int i = 0; i < COLUMNS; i++) s[r][i] = Kind::product(s[r][i], w[i], x[r * x_row + k]);
    }
    for (int r = 0; r < R; r++)
      for (int i = 0; i < COLUMNS; i++) store(sums + r * WIDE + 16 * (c + i), s[r][i]);
  }
}

template <class Kind>
void multiply(int64_t rows, const typename Kind::Input *x, int64_t x_row, const Panel<Kind> &p, float *sums, bool add) {
  switch (rows) {
  case 1: return multiply<Kind, 1>(x, x_row, p, sums, add);
  case 2: return multiply<Kind, 2>(x, x_row, p, sums, add);
#ifdef __AVX512F__
  case 3: return multiply<Kind, 3>(x, x_row, p, sums, add);
  case 4: return multiply<Kind, 4>(x, x_row, p, sums, add);
  case 5: return multiply<Kind, 5>(x, x_row, p, sums, add);
#endif
  default: return multiply<Kind, ROWS>(x, x_row, p, sums, add);
  }
}

// Up to 64 outputs of up to CHUNK rows.
template <class Kind>
void block(const typename Kind::Input *x, int64_t x_row, const typename Kind::Weight *weights, int64_t inputs,
           const typename Kind::Number *bias, typename Kind::Number *out, int64_t out_row, int64_t rows, int64_t outputs) {
  float *sums = (float *)scratch.get(CHUNK * WIDE * 4);
  constexpr int64_t LINES = WIDE * sizeof(typename Kind::Weight) / 64; // of one input
  int64_t deep = rows <= ROWS ? inputs : Kind::DEEP, turns = (rows + ROWS - 1) / ROWS;
  for (int64_t k = 0; k < inputs; k += deep) {
    Panel<Kind> p{weights + k * WIDE, std::min(deep, inputs - k), nullptr, 0, 0};
    p.step = (LINES + turns - 1) / turns;
    int64_t lines = std::max<int64_t>(0, std::min(deep, inputs - k - deep)) * LINES, done = 0;
    for (int64_t i = 0; i < turns; i++, done += p.deep * p.step) { // as many rows in each as can be: few sums wait for one another
      int64_t r = i * rows / turns, stop = (i + 1) * rows / turns;
      p.ahead = (const char *)p.weights + (deep * LINES + done) * 64;
      p.lines = std::max<int64_t>(0, std::min(p.deep * p.step, lines - done));
      multiply<Kind>(stop - r, x + r * x_row + k, x_row, p, sums + r * WIDE, k > 0);
    }
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < outputs; i += 16) {
      F16 y = load<F16>(sums + r * WIDE + i);
      if (bias) y += widen(bias + i, outputs - i);
      narrow(out + r * out_row + i, y, outputs - i);
    }
}

template <class Kind>
void product(const typename Kind::Input *x, int64_t x_row, const typename Kind::Weight *packed,
             const typename Kind::Number *bias, typename Kind::Number *out, int64_t rows, int64_t inputs, int64_t outputs,
             int64_t threads) {
  int64_t blocks = (outputs + WIDE - 1) / WIDE, chunks = (rows + CHUNK - 1) / CHUNK;
  share_out(threads, blocks * chunks, [&](int64_t i) {
    int64_t b = i % blocks, first = i / blocks * CHUNK, from = b * WIDE;
    block<Kind>(x + first * x_row, x_row, packed + b * inputs * WIDE, inputs, bias ? bias + from : nullptr,
                out + first * outputs + from, outputs, std::min(CHUNK, rows - first), std::min(WIDE, outputs - from));
  });
}

// The same for numbers that are multiplied as floats, to which the rows are widened once.
template <class T>
void widened(const T *x, int64_t x_row, const T *packed, const T *bias, T *out, int64_t rows, int64_t inputs, int64_t outputs,
             int64_t threads) {
  if constexpr (sizeof(T) == 4) return product<Singles<T>>(x, x_row, packed, bias, out, rows, inputs, outputs, threads);
  int64_t wide = (inputs + 15) / 16 * 16;
  float *all = (float *)inputs_wide.get(4 * (size_t)std::max<int64_t>(1, rows * wide));
  share_out(rows * inputs < 16384 ? 1 : threads, rows, [&](int64_t r) {
    for (int64_t i = 0; i < inputs; i += 16) store(all + r * wide + i, widen(x + r * x_row + i, inputs - i));
  });
  product<Singles<T>>(all, wide, packed, bias, out, rows, inputs, outputs, threads);
}

// weights[O, I] -> packed; a number is `Number` or a pair of them.
template <class Number>
void pack(const Number *weights, Number *packed, int64_t outputs, int64_t inputs, int64_t threads) {
  share_out(threads, (outputs + WIDE - 1) / WIDE, [&](int64_t b) {
    for (int64_t k = 0; k < inputs; k++)
      for (int64_t i = 0; i < WIDE; i++) {
        int64_t o = b * WIDE + i;
        packed[(b * inputs + k) * WIDE + i] = o < outputs ? weights[o * inputs + k] : Number{};
      }
  });
}

} // namespace

EXPORT int64_t multiplies_pairs() { return KVASIR_PAIRS; }

EXPORT void pack_linear(int64_t type, const void *weights, void *packed, int64_t outputs, int64_t inputs, int64_t threads) {
  if (type == FLOAT32) return pack((const uint32_t *)weights, (uint32_t *)packed, outputs, inputs, threads);
  if (type == BFLOAT16 && KVASIR_PAIRS)
    return pack((const uint32_t *)weights, (uint32_t *)packed, outputs, inputs / 2, threads);
  pack((const uint16_t *)weights, (uint16_t *)packed, outputs, inputs, threads);
}

// x[T, I] (rows x_row numbers apart) times packed, plus bias[O] -> out[T, O].
EXPORT void linear(int64_t type, const void *x, int64_t x_row, const void *packed, const void *bias, void *out, int64_t rows,
                   int64_t inputs, int64_t outputs, int64_t threads) {
#if KVASIR_PAIRS
  if (type == BFLOAT16)
    return product<Pairs>((const uint32_t *)x, x_row / 2, (const uint32_t *)packed, (const bf16 *)bias, (bf16 *)out, rows,
                          inputs / 2, outputs, threads);
#endif
  if (type == FLOAT32)
    widened((const float *)x, x_row, (const float *)packed, (const float *)bias, (float *)out, rows, inputs, outputs, threads);
  else if (type == BFLOAT16)
    widened((const bf16 *)x, x_row, (const bf16 *)packed, (const bf16 *)bias, (bf16 *)out, rows, inputs, outputs, threads);
  else
    widened((const fp16 *)x, x_row, (const fp16 *)packed, (const fp16 *)bias, (fp16 *)out, rows, inputs, outputs, threads);
}
