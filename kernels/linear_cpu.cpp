// Products with weights that stay, packed so that 32 outputs take an input at once: [O / 32][I][32], or where the CPU
// multiplies pairs of bfloat16 [O / 32][I / 2][32][2]; the last block is filled up with zeros. Other bfloat16 are laced. Every output adds its products
// in the order of the inputs, in float32: how many rows there are changes no bit of it.
#include "linear_parts.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t WIDE = 32;   // outputs in a block,
constexpr int VECTORS = 2;     // so many of 16
constexpr int64_t CHUNK = 384; // rows for which a panel is read once
constexpr int64_t DEEP = 256;  // inputs of a panel at most: 32 KiB of weights, which stay in the first cache
#ifdef __AVX512F__
constexpr int64_t ROWS = 14; // rows whose sums are in registers at once,
constexpr int64_t BOTH = 14; // of all outputs of a block; with more rows its halves come one after the other
constexpr int64_t CALLED = 6;
#else
constexpr int64_t ROWS = 6;
constexpr int64_t BOTH = 3;
constexpr int64_t CALLED = 1;
#endif
// From CALLED rows on in registers the CPU doesn't look far enough ahead by itself, and weights are called for: the next panel,
// or where all are read once what lies AHEAD bytes behind. One Zen 4 core read weights for 1 / 4 / 8 / 10 rows at 32 / 29 / 17 / 12 GB/s without
// and at 22 / 21 / 28 / 22 with, which is all it multiplies by 10 rows.
constexpr int64_t AHEAD = 16384;
static_assert(CALLED <= (ROWS + 1) / 2, "rows that aren't called for go in one turn");

thread_local Scratch scratch, laid;

#if KVASIR_PAIRS
// Weights and rows as pairs, one pair of each in 32 bits.
struct Pairs {
  typedef uint32_t Weight, Input, Given;
  typedef bf16 Number;
  static F16 product(F16 sum, F16 w, uint32_t x) {
    return (F16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)x));
  }
  static F16 weights(const uint32_t *p) { return load<F16>(p); }
  static uint32_t input(uint32_t x) { return x; }
  static __m512 inputs(const uint32_t *p, int64_t n) { return (__m512)_mm512_maskz_loadu_epi32((__mmask16)((1 << n) - 1), p); }
};
#endif

// Where a register holds N floats, bfloat16 of output n stands beside that of n + N, as `unlaced` takes them apart.
constexpr int64_t N = REGISTER / 4;
template <class T>
constexpr bool laced = std::is_same_v<T, bf16> && 2 * N <= 16;
template <class T>
int64_t output_at(int64_t place) { // which stands at a place of a block
  return laced<T> ? place / (2 * N) * (2 * N) + place % 2 * N + place % (2 * N) / 2 : place;
}

template <class T>
struct Singles {
  typedef T Weight, Given, Number;
  typedef float Input;
  static F16 product(F16 sum, F16 w, float x) { return sum + w * x; }
  static F16 weights(const T *p) {
    if constexpr (laced<T>)
      return unlaced<F16>(p);
    else
      return widen(p);
  }
  static float input(T x) { return scalar(x); }
#ifdef __AVX512F__
  static __m512 inputs(const T *p, int64_t n) { return (__m512)widen(p, n); }
#endif
};

template <class Kind>
struct Panel {
  const typename Kind::Weight *weights;
  int64_t deep;
  const char *ahead; // what is called for meanwhile: so many lines,
  int64_t lines;
};

// sums[R][32] of x[deep][R], or of x[R][x_row] if nothing is called for, with a panel: its outputs from 16 * first on.
template <class Kind, int R, int V>
void multiply(const typename Kind::Input *x, int64_t x_row, const Panel<Kind> &p, float *sums, bool add, int first) {
  F16 s[R][V];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < V; i++) s[r][i] = add ? load<F16>(sums + r * WIDE + 16 * (first + i)) : splat(0.0f);
  auto one = [&](int64_t k) __attribute__((always_inline)) {
    F16 w[V];
    for (int i = 0; i < V; i++) w[i] = Kind::weights(p.weights + k * WIDE + 16 * (first + i));
    for (int r = 0; r < R; r++)
      for (int i = 0; i < V; i++) s[r][i] = Kind::product(s[r][i], w[i], R < CALLED ? x[r * x_row + k] : x[k * R + r]);
  };
  int64_t k = 0;
  if constexpr (R >= CALLED) { // spread out: of many at once the CPU waits for room. Two Zen 3 cores: 1.1 to 1.25 times as fast
    int64_t together = std::max<int64_t>(1, (p.lines + p.deep - 1) / p.deep), calls = p.lines / together;
    int64_t each = calls ? p.deep / calls : 0;
    auto call = [&](int64_t n) __attribute__((always_inline)) {
      for (int64_t i = n * together; i < (n + 1) * together; i++) __builtin_prefetch(p.ahead + 64 * i, 0, 2);
    };
    if (R <= BOTH && each == 1)
      for (; k < calls; k++) call(k), one(k);
    else
      for (int64_t n = 0; n < calls; n++) {
        call(n);
        for (int64_t end = k + each; k < end; k++) one(k);
      }
  }
  if constexpr (R < CALLED) // how far the CPU looks ahead is counted in instructions
    for (; k + 4 <= p.deep; k += 4) one(k), one(k + 1), one(k + 2), one(k + 3);
  for (; k < p.deep; k++) one(k);
  for (int r = 0; r < R; r++)
    for (int i = 0; i < V; i++) store(sums + r * WIDE + 16 * (first + i), s[r][i]);
}

template <class Kind, int R = ROWS>
void multiply(int64_t rows, const typename Kind::Input *x, int64_t x_row, const Panel<Kind> &p, float *sums, bool add) {
  if constexpr (R > 1)
    if (rows < R) return multiply<Kind, R - 1>(rows, x, x_row, p, sums, add);
  constexpr int V = R <= BOTH ? VECTORS : 1, PASSES = VECTORS / V;
  for (int pass = 0; pass < PASSES; pass++) {
    int64_t done = pass * p.lines / PASSES, next = (pass + 1) * p.lines / PASSES;
    multiply<Kind, R, V>(x, x_row, {p.weights, p.deep, p.ahead + 64 * done, next - done}, sums, add, V * pass);
  }
}

// How many times a chunk's rows fill the registers, and which are the first of the i-th time: as many in each as can be, since
// few sums wait for one another.
int64_t turns_of(int64_t rows) { return (rows + ROWS - 1) / ROWS; }
int64_t first_of(int64_t i, int64_t rows) { return i * rows / turns_of(rows); }

// Up to 32 outputs of up to CHUNK rows, which `lay_down` laid down.
template <class Kind>
void block(const typename Kind::Input *x, int64_t x_row, const typename Kind::Weight *weights, int64_t inputs,
           const typename Kind::Number *bias, typename Kind::Number *out, int64_t out_row, int64_t rows, int64_t outputs) {
  float *sums = (float *)scratch.get(CHUNK * WIDE * 4);
  constexpr int64_t LINES = WIDE * sizeof(typename Kind::Weight) / 64; // of one input
  bool once = rows <= BOTH; // all weights are read once, and no panel has to stay
  int64_t turns = turns_of(rows), panels = once ? 1 : (inputs + DEEP - 1) / DEEP;
  for (int64_t n = 0; n < panels; n++) {
    int64_t k = n * inputs / panels, deep = (n + 1) * inputs / panels - k, lines = deep * LINES;
    Panel<Kind> p{weights + k * WIDE, deep, nullptr, 0};
    // what follows in memory is called for meanwhile: the next panel, or with few rows what lies AHEAD; be it the next block's
    const char *ahead = (const char *)p.weights + (once ? AHEAD : lines * 64);
    for (int64_t i = 0; i < turns; i++) {
      int64_t r = first_of(i, rows), count = first_of(i + 1, rows) - r;
      int64_t done = i * lines / turns;
      p.ahead = ahead + done * 64;
      p.lines = (i + 1) * lines / turns - done;
      multiply<Kind>(count, x + r * inputs + k * count, x_row, p, sums + r * WIDE, n > 0);
    }
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < outputs; i += 16) {
      F16 y = load<F16>(sums + r * WIDE + i);
      if (bias) y += widen(bias + i, outputs - i);
      narrow(out + r * out_row + i, y, outputs - i);
    }
}

// x[count][x_row] -> to[inputs][count].
template <class Kind>
void interleave(const typename Kind::Given *x, int64_t x_row, int64_t count, int64_t inputs, typename Kind::Input *to) {
  int64_t k = 0;
#ifdef __AVX512F__
  for (; k < inputs; k += 16) {
    int64_t there = std::min<int64_t>(16, inputs - k);
    __m512 r[16] = {};
    for (int64_t j = 0; j < count; j++) r[j] = Kind::inputs(x + j * x_row + k, there);
    transpose(r);
    for (int64_t i = 0; i < there; i++) _mm512_mask_storeu_ps(to + (k + i) * count, (__mmask16)((1 << count) - 1), r[i]);
  }
#endif
  for (; k < inputs; k++)
    for (int64_t j = 0; j < count; j++) to[k * count + j] = Kind::input(x[j * x_row + k]);
}

// Up to CHUNK rows of x[T, I] as `multiply` takes them: of those that go together one input after the other; very few as they are. In memory of
// the thread's own: what another core has just written comes line by line, and slowly.
template <class Kind>
const typename Kind::Input *lay_down(const typename Kind::Given *x, int64_t &x_row, int64_t rows, int64_t inputs) {
  typedef typename Kind::Input Input;
  if constexpr (std::is_same_v<Input, typename Kind::Given>)
    if (rows < CALLED) return x;
  Input *out = (Input *)laid.get(sizeof(Input) * (size_t)std::max<int64_t>(1, rows * inputs));
  for (int64_t turn = 0; turn < turns_of(rows); turn++) {
    int64_t r = first_of(turn, rows), count = first_of(turn + 1, rows) - r;
    const typename Kind::Given *from = x + r * x_row;
    Input *to = out + r * inputs;
    if (count >= CALLED) {
      interleave<Kind>(from, x_row, count, inputs, to);
      continue;
    }
    for (int64_t j = 0; j < count; j++)
      for (int64_t k = 0; k < inputs; k++) to[j * inputs + k] = Kind::input(from[j * x_row + k]);
  }
  x_row = inputs;
  return out;
}

// Parts of up to CHUNK rows each. A thread lays rows down when it comes to them: runs of blocks mostly stay within a part.
template <class Kind>
void products(const std::vector<Part> &parts, int64_t inputs, int64_t outputs, int64_t threads) {
  constexpr int64_t NUMBERS = sizeof(typename Kind::Given) / sizeof(typename Kind::Number);
  int64_t blocks = (outputs + WIDE - 1) / WIDE;
  inputs /= NUMBERS;
  share_runs(threads, blocks * (int64_t)parts.size(), [&] {
    return [&, x = (const typename Kind::Input *)nullptr, x_row = (int64_t)0, last = (const Part *)nullptr](int64_t i) mutable {
      const Part &p = parts[i / blocks];
      if (&p != last) x_row = p.x_row / NUMBERS, x = lay_down<Kind>((const typename Kind::Given *)p.x, x_row, p.rows, inputs), last = &p;
      int64_t from = i % blocks * WIDE;
      auto *bias = (const typename Kind::Number *)p.bias;
      block<Kind>(x, x_row, (const typename Kind::Weight *)p.weights + from * inputs, inputs, bias ? bias + from : nullptr,
                  (typename Kind::Number *)p.out + from, p.out_row, p.rows, std::min(WIDE, outputs - from));
    };
  });
}

// weights[O, I] -> packed; a number is of type T, or a pair of them.
template <class T, class Number>
void pack(const Number *weights, Number *packed, int64_t outputs, int64_t inputs, int64_t threads) {
  share_out(threads, (outputs + WIDE - 1) / WIDE, [&](int64_t b) {
    for (int64_t k = 0; k < inputs; k++)
      for (int64_t i = 0; i < WIDE; i++) {
        int64_t o = b * WIDE + output_at<T>(i);
        packed[(b * inputs + k) * WIDE + i] = o < outputs ? weights[o * inputs + k] : Number{};
      }
  });
}

} // namespace

EXPORT int64_t multiplies_pairs() { return KVASIR_PAIRS; }
EXPORT int64_t vector_bytes() { return REGISTER; }

EXPORT void pack_linear(int64_t type, const void *weights, void *packed, int64_t outputs, int64_t inputs, int64_t threads) {
  if (type == FLOAT32) return pack<float>((const uint32_t *)weights, (uint32_t *)packed, outputs, inputs, threads);
  if (type == BFLOAT16 && KVASIR_PAIRS)
    return pack<float>((const uint32_t *)weights, (uint32_t *)packed, outputs, inputs / 2, threads);
  auto pack_16 = type == BFLOAT16 ? pack<bf16, uint16_t> : pack<fp16, uint16_t>;
  pack_16((const uint16_t *)weights, (uint16_t *)packed, outputs, inputs, threads);
}

EXPORT void linear_parts(int64_t type, const Part *given, int64_t count, int64_t inputs, int64_t outputs, int64_t threads) {
  int64_t size = type == FLOAT32 ? 4 : 2;
  std::vector<Part> parts;
  for (const Part *p = given; p < given + count; p++)
    for (int64_t r = 0; r < p->rows; r += CHUNK)
      parts.push_back({(const char *)p->x + r * p->x_row * size, p->x_row, p->weights, p->bias,
                       (char *)p->out + r * p->out_row * size, p->out_row, std::min(CHUNK, p->rows - r)});
  if (type == FLOAT32) return products<Singles<float>>(parts, inputs, outputs, threads);
  if (type == FLOAT16) return products<Singles<fp16>>(parts, inputs, outputs, threads);
#if KVASIR_PAIRS
  products<Pairs>(parts, inputs, outputs, threads);
#else
  products<Singles<bf16>>(parts, inputs, outputs, threads);
#endif
}

// x[T, I] (rows x_row numbers apart) times packed, plus bias[O] -> out[T, O].
EXPORT void linear(int64_t type, const void *x, int64_t x_row, const void *packed, const void *bias, void *out, int64_t rows,
                   int64_t inputs, int64_t outputs, int64_t threads) {
  Part part{x, x_row, packed, bias, out, outputs, rows};
  linear_parts(type, &part, 1, inputs, outputs, threads);
}

// x[T, H, I] times packed[H] -> out[T, H, O], each head by a matrix of its own. Strides are in numbers; packed ones are
// `packed_head` apart.
EXPORT void linear_heads(int64_t type, const void *x, int64_t x_row, int64_t x_head, const void *packed, int64_t packed_head, void *out,
                         int64_t rows, int64_t heads, int64_t inputs, int64_t outputs, int64_t threads) {
  int64_t size = type == FLOAT32 ? 4 : 2;
  std::vector<Part> parts;
  for (int64_t h = 0; h < heads; h++)
    parts.push_back({(const char *)x + h * x_head * size, x_row, (const char *)packed + h * packed_head * size, nullptr,
                     (char *)out + h * outputs * size, heads * outputs, rows});
  linear_parts(type, parts.data(), heads, inputs, outputs, threads);
}
