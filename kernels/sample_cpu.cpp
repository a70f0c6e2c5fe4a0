// From logits to tokens for CPUs. A row is one thread's from its first number to its last, so that not a bit of what is found
// depends on what else is in the batch.
#include "native.h"

#include <algorithm>
#include <functional>

namespace {

constexpr int64_t PIECE = 512;     // numbers whose sum is kept, to find the drawn one by
constexpr float ONE = 0x1p40f;     // probabilities are whole multiples of 2^-40 (WEIGHT_BITS in sample.py)
constexpr int32_t LOWEST = 87 << 7; // the upper half of the bits of 2^-40: the first bucket of `nucleus`
constexpr int64_t BUCKETS = (127 << 7) - LOWEST + 1;
constexpr int64_t SLACK = 1024; // candidates that are kept beyond those wanted

typedef float F8 __attribute__((vector_size(32)));
typedef int64_t L8 __attribute__((vector_size(64)));

thread_local Scratch likely, piece_sums, candidates, masses, chosen;

int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// A number and its place as one integer: the larger number is the larger integer, of equals that of the first place.
int64_t key_of(float x, int64_t place) {
  int32_t bits = bits_of(x), ordered = bits ^ (bits >> 31 & 0x7fffffff);
  return (int64_t)((uint64_t)ordered << 32 | (uint32_t)~(uint32_t)place);
}
int64_t place_of(int64_t key) { return (uint32_t)~(uint32_t)key; }

// A bit for each number of which the comparison holds.
uint32_t lanes(I16 mask) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif KVASIR_EIGHTS
  return (uint32_t)_mm256_movemask_ps((__m256)mask.low) | (uint32_t)_mm256_movemask_ps((__m256)mask.high) << 8;
#else
  uint32_t bits = 0;
  for (int i = 0; i < 16; i++) bits |= (uint32_t)(mask[i] & 1) << i;
  return bits;
#endif
}
uint32_t within(int64_t n) { return n >= 16 ? 0xffff : (1u << n) - 1; } // the first n of 16

template <class Run>
void each(uint32_t bits, Run run) {
  for (; bits; bits &= bits - 1) run(__builtin_ctz(bits));
}

float best_of(const float *x, int64_t n) { // NaN is none
  F16 best[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 4; j++) best[j] = larger(load<F16>(x + i + 16 * j), best[j]);
  float found = largest(larger(larger(best[0], best[1]), larger(best[2], best[3])));
  for (; i < n; i++) found = x[i] > found ? x[i] : found;
  return found;
}

// e[n] (filled up with zeros to whole pieces): how likely each is, the best being 1; less likely than e^floor is 0.
void likelihoods(const float *x, int64_t n, float temperature, float floor, float *e) {
  float best = best_of(x, n);
  for (int64_t i = 0; i < n; i += 16) {
    F16 v = (widen(x + i, n - i) - best) / temperature;
    store(e + i, where(v >= floor, exponential(v), splat(0.0f))); // NaN too
  }
  int64_t whole = (n + PIECE - 1) / PIECE * PIECE;
  std::memset(e + n, 0, (whole - n) * 4);
}

// Sums of e[n] by pieces as integers -> their sum.
int64_t add_up(const float *e, int64_t n, int64_t *sums) {
  int64_t total = 0;
  for (int64_t p = 0; p * PIECE < n; p++) {
    L8 some = {};
    for (int64_t i = p * PIECE; i < (p + 1) * PIECE; i += 8) some += __builtin_convertvector(load<F8>(e + i) * ONE, L8);
    sums[p] = 0;
    for (int i = 0; i < 8; i++) sums[p] += some[i];
    total += sums[p];
  }
  return total;
}

// The first of e[n] at which the sum exceeds its `u`-th part; -1: all are 0.
int64_t invert(const float *e, int64_t n, double u) {
  int64_t *sums = (int64_t *)piece_sums.get((n + PIECE - 1) / PIECE * 8);
  int64_t total = add_up(e, n, sums), p = 0, i = 0;
  if (total <= 0) return -1;
  int64_t target = std::min((int64_t)(u * (double)total), total - 1);
  while (target >= sums[p]) target -= sums[p++];
  for (i = p * PIECE; (target -= (int64_t)(e[i] * ONE)) >= 0;) i++;
  return i;
}

// The `count` largest of x[n], the largest first, as keys; NaN is none. found[2 * count + SLACK]
int64_t largest_of(const float *x, int64_t n, int64_t count, int64_t *found) {
  if (count < 1) return 0;
  int64_t there = 0;
  float border = 0;
  bool full = false; // then only what is above `border` matters: of equals the first are kept
  auto shrink = [&] {
    std::nth_element(found, found + count - 1, found + there, std::greater<int64_t>());
    there = count, border = x[place_of(found[count - 1])], full = true;
  };
  for (int64_t i = 0; i < n; i += 16) {
    F16 v = widen(x + i, n - i);
    each(lanes(full ? v > border : v == v) & within(n - i), [&](int64_t j) { found[there++] = key_of(x[i + j], i + j); });
    if (there > 2 * count + SLACK - 16) shrink();
  }
  if (there > count) shrink();
  std::sort(found, found + there, std::greater<int64_t>());
  return there;
}

// Of e[n] only the most likely whose sum reaches the share `mass` stay: others become 0. By x, whose e they are, among those
// that fall into the same bucket by e.
void nucleus(const float *x, float *e, int64_t n, float mass) {
  int64_t *sums = (int64_t *)piece_sums.get((n + PIECE - 1) / PIECE * 8), *keys = (int64_t *)candidates.get(n * 8), there = 0, kept = 0;
  double total = (double)add_up(e, n, sums) / ONE, goal = mass * total, before = 0;
  float cut = (float)((1.0 - mass) * total / n * 0.999); // all below it together aren't what may be missing
  double *found = (double *)masses.get(BUCKETS * 8);
  std::memset(found, 0, BUCKETS * 8);
  auto bucket = [](float y) { return (int64_t)std::max(0, (bits_of(y) >> 16) - LOWEST); };
  for (int64_t i = 0; i < n; i += 16)
    each(lanes(load<F16>(e + i) > cut), [&](int64_t j) { found[bucket(e[i + j])] += e[i + j]; });
  int64_t edge = BUCKETS - 1;
  while (edge > 0 && before + found[edge] < goal) before += found[edge--];
  int32_t low = edge ? ((int32_t)edge + LOWEST) << 16 : 1;
  float least;
  std::memcpy(&least, &low, 4);
  for (int64_t i = 0; i < n; i += 16) {
    F16 v = load<F16>(e + i);
    store(e + i, where(v >= least, v, splat(0.0f)));
    each(lanes(v >= least), [&](int64_t j) {
      if (bucket(e[i + j]) == edge) keys[there++] = key_of(x[i + j], i + j);
    });
  }
  std::sort(keys, keys + there, std::greater<int64_t>());
  while (kept < there && (before < goal || !kept)) before += e[place_of(keys[kept++])];
  while (kept < there) e[place_of(keys[kept++])] = 0;
}

// The draw among the `count` most likely of x[n], whose e they are, or as many of these as reach the share `mass`; -1: none.
int64_t among(const float *x, const float *e, int64_t n, int64_t count, float mass, double u) {
  int64_t *found = (int64_t *)candidates.get((2 * count + SLACK) * 8), there = largest_of(x, n, count, found), kept = 0;
  double total = 0, before = 0;
  for (int64_t i = 0; i < there; i++) total += e[place_of(found[i])];
  while (kept < there && (before < mass * total || !kept)) before += e[place_of(found[kept++])];
  for (int64_t i = 0; i < kept; i++) found[i] = place_of(found[i]);
  std::sort(found, found + kept); // drawn in the order of places, as without filters
  size_t whole = (kept + PIECE - 1) / PIECE * PIECE * 4;
  float *own = (float *)chosen.get(whole);
  std::memset(own, 0, whole);
  for (int64_t i = 0; i < kept; i++) own[i] = e[found[i]];
  int64_t i = invert(own, kept, u);
  return i < 0 ? -1 : found[i];
}

int64_t draw_one(const float *x, int64_t n, double u, float temperature, float min_p, int64_t top_k, float top_p) {
  float *e = (float *)likely.get((n + PIECE - 1) / PIECE * PIECE * 4);
  likelihoods(x, n, temperature, min_p > 0 ? std::log(min_p) : -INFINITY, e);
  int64_t found;
  if (top_k < n)
    found = among(x, e, n, top_k, top_p, u);
  else {
    if (top_p < 1) nucleus(x, e, n, top_p);
    found = invert(e, n, u);
  }
  return found < 0 ? std::max_element(x, x + n) - x : found; // all barred, or infinite
}

void score_one(const float *x, int64_t n, int64_t token, int64_t best, float *own, int64_t *rank, int64_t *ids, float *values) {
  float most = best_of(x, n);
  double total = 0;
  I16 above = {};
  for (int64_t p = 0; p < n; p += PIECE) {
    F16 some = splat(0.0f);
    for (int64_t i = p; i < std::min(n, p + PIECE); i += 16) {
      F16 v = n - i >= 16 ? load<F16>(x + i) : widen(x + i, n - i), e = exponential(v - most);
      if (n - i < 16) {
        I16 there = places() < (int32_t)(n - i);
        e = where(there, e, splat(0.0f)), v = where(there, v, splat(-INFINITY));
      }
      some += e, above -= v > x[token];
    }
    total += sum(some);
  }
  float log_total = (float)std::log(total);
  *own = x[token] - most - log_total;
  *rank = 1;
  for (int i = 0; i < 16; i++) *rank += above[i];
  int64_t *found = (int64_t *)candidates.get((2 * best + SLACK) * 8);
  int64_t there = largest_of(x, n, best, found);
  for (int64_t i = 0; i < best; i++) {
    ids[i] = i < there ? place_of(found[i]) : 0;
    values[i] = i < there ? x[ids[i]] - most - log_total : -INFINITY;
  }
}

// The first n of 16, and zeros.
template <class T>
I16 some(const T *p, int64_t n) {
  T found[16] = {};
  std::memcpy(found, p, std::min<size_t>(sizeof found, n * sizeof(T)));
  return load_as<I16>(found);
}

struct Penalties {
  float repetition, presence, frequency;
};

void penalise_piece(const float *x, const int32_t *counts, const uint8_t *prompts, const Penalties &p, float *out, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    F16 v = widen(x + i, n - i);
    I16 count = some(counts + i, n - i), seen = count > 0;
    if (p.repetition != 1.0f) {
      if (prompts) seen |= some(prompts + i, n - i) != 0;
      v = where(seen, where(v > 0.0f, v / p.repetition, v * p.repetition), v);
    }
    v = v - p.frequency * convert<F16>(count) - where(count > 0, splat(p.presence), splat(0.0f));
    narrow(out + i, v, n - i);
  }
}

} // namespace

// logits[R, V] (rows x_row apart) -> tokens[R]; filters that no row uses are null, and a row that doesn't use one passes what
// changes nothing. top_k >= 1, top_p > 0.
EXPORT void draw(const float *x, int64_t x_row, const double *uniforms, const float *temperature, const float *min_p,
                 const int64_t *top_k, const float *top_p, int64_t *tokens, int64_t rows, int64_t vocab, int64_t threads) {
  share_out(threads, rows, [&](int64_t r) {
    tokens[r] = draw_one(x + r * x_row, vocab, uniforms[r], temperature[r], min_p ? min_p[r] : 0.0f, top_k ? top_k[r] : vocab,
                         top_p ? top_p[r] : 2.0f);
  });
}

// Of tokens[R] under logits[R, V]: log probability, rank, and the ids and log probabilities of the `best` most likely.
EXPORT void score(const float *x, int64_t x_row, const int64_t *tokens, int64_t best, float *own, int64_t *rank, int64_t *ids,
                  float *values, int64_t rows, int64_t vocab, int64_t threads) {
  share_out(threads, rows, [&](int64_t r) {
    score_one(x + r * x_row, vocab, tokens[r], best, own + r, rank + r, ids + r * best, values + r * best);
  });
}

// logits[R, V] -> out[R, V]; a row's counts[N, V] and prompts[N, V] are those of its seat. Null: no repetition, no prompts.
EXPORT void penalise(const float *x, int64_t x_row, const int32_t *counts, const uint8_t *prompts, const int64_t *seats,
                     const float *repetition, const float *presence, const float *frequency, float *out, int64_t rows,
                     int64_t vocab, int64_t threads) {
  int64_t pieces = (vocab + 16 * PIECE - 1) / (16 * PIECE);
  share_out(threads, rows * pieces, [&](int64_t i) {
    int64_t r = i / pieces, from = i % pieces * 16 * PIECE, seat = seats ? seats[r] : r;
    Penalties p{repetition ? repetition[r] : 1.0f, presence[r], frequency[r]};
    penalise_piece(x + r * x_row + from, counts + seat * vocab + from, prompts ? prompts + seat * vocab + from : nullptr, p,
                   out + r * vocab + from, std::min(16 * PIECE, vocab - from));
  });
}
