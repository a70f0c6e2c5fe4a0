// What is done row by row between the large products: norms with the residual, rotation with the cache write, gates.
// Intermediate results are rounded where the definitions round them.
#include "native.h"

#include <algorithm>
#include <type_traits>

namespace {

constexpr int64_t ALONE = 16384; // numbers that one thread handles sooner than two would have met

template <class T>
F16 rounded_to(F16 x) {
  T part[16];
  narrow(part, x);
  return widen(part);
}
template <>
F16 rounded_to<float>(F16 x) { return x; }
template <>
F16 rounded_to<bf16>(F16 x) { return rounded_to_bf16(x); }

template <class Run>
void by_rows(int64_t threads, int64_t rows, int64_t numbers, Run run) {
  int64_t some = std::max<int64_t>(1, ALONE / 4 / std::max<int64_t>(1, numbers));
  share_out(rows * numbers < ALONE ? 1 : threads, (rows + some - 1) / some, [&](int64_t i) {
    for (int64_t row = i * some; row < std::min(rows, (i + 1) * some); row++) run(row);
  });
}

// One row: total = x + scale * y (y may be null), out = its norm times weight.
template <class T>
void norm_row(const T *x, const T *y, float scale, const T *weight, float offset, float eps, T *total, T *out, int64_t width) {
  F16 squares = splat(0.0f);
  for (int64_t d = 0; d < width; d += 16) {
    F16 v = widen(x + d, width - d);
    if (y) {
      F16 w = widen(y + d, width - d);
      if (scale != 1.0f) w = rounded_to<T>(w * scale);
      v = rounded_to<T>(v + w);
      narrow(total + d, v, width - d);
    }
    squares += v * v;
  }
  F16 factor = splat(1.0f / std::sqrt(sum(squares) / (float)width + eps));
  const T *from = y ? total : x;
  for (int64_t d = 0; d < width; d += 16) {
    F16 v = widen(from + d, width - d) * factor;
    if (weight && offset != 0.0f)
      v *= widen(weight + d, width - d) + offset;
    else if (weight)
      v = rounded_to<T>(v) * widen(weight + d, width - d);
    narrow(out + d, v, width - d);
  }
}

// Row r of x lies at r / inner * outer + r % inner * x_row.
template <class T>
void norms(const T *x, int64_t outer, int64_t inner, int64_t x_row, const T *y, float scale, const T *weight, float offset, float eps, T *total, T *out,
           int64_t rows, int64_t width, int64_t threads) {
  by_rows(threads, rows, width, [&](int64_t r) {
    norm_row(x + r / inner * outer + r % inner * x_row, y ? y + r * width : nullptr, scale, weight, offset, eps, total + r * width, out + r * width, width);
  });
}

enum Gate { SILU, GELU_TANH, CLAMPED };

template <class T>
void gates(const T *x, T *out, int64_t rows, int64_t width, int64_t kind, float limit, int64_t threads) {
  by_rows(threads, rows, width, [&](int64_t r) {
    const T *gate = x + 2 * r * width, *up = gate + width;
    for (int64_t d = 0; d < width; d += 16) {
      F16 g = widen(gate + d, width - d);
      if (kind == CLAMPED) {
        F16 u = smaller(splat(limit), larger(splat(-limit), widen(up + d, width - d)));
        g = smaller(splat(limit), g);
        g = rounded_to<T>(g * rounded_to<T>(1.0f / (1.0f + exponential(-rounded_to<T>(g * 1.702f)))));
        narrow(out + r * width + d, g * rounded_to<T>(u + 1.0f), width - d);
        continue;
      }
      F16 inner = kind == SILU ? g : 1.59576912f * (g + 0.044715f * g * g * g); // twice the tangent's argument
      g = g / (1.0f + exponential(-inner));
      narrow(out + r * width + d, rounded_to<T>(g) * widen(up + d, width - d), width - d);
    }
  });
}

struct Turn {
  int64_t q_row, k_row, v_row, heads, keys, dim, turned, interleaved;
  const int64_t *slots;
};

// One head's numbers, rounded to the cache's type; 8 bits are shares of the largest.
template <class C, class T>
void put_row(const T *x, int64_t dim, C *to, float *scale) {
  if constexpr (std::is_same_v<C, T>) {
    std::memcpy((void *)to, x, dim * sizeof(T));
  } else if constexpr (scaled<C>) {
    F16 best = splat(0.0f), odd = best; // odd: NaN where a number is, or infinite, and then all of the row is
    for (int64_t d = 0; d < dim; d += 16) {
      F16 v = widen(x + d, dim - d);
      best = larger(best, where(v < 0.0f, -v, v)), odd += v - v;
    }
    *scale = largest(best) / most<C> + sum(odd);
    float by = *scale == 0.0f ? 1.0f : *scale;
    for (int64_t d = 0; d < dim; d += 16)
      narrow(to + d, smaller(splat(most<C>), larger(splat(-most<C>), widen(x + d, dim - d) / by)), dim - d);
  } else {
    for (int64_t d = 0; d < dim; d += 16) narrow(to + d, widen(x + d, dim - d), dim - d);
  }
}

template <class T>
void put(const T *x, int64_t dim, int64_t type, void *cache, int64_t place, float *scale) {
  switch (type) {
  case FLOAT32: return put_row(x, dim, (float *)cache + place, scale);
  case BFLOAT16: return put_row(x, dim, (bf16 *)cache + place, scale);
  case FLOAT16: return put_row(x, dim, (fp16 *)cache + place, scale);
  case INT8: return put_row(x, dim, (int8 *)cache + place, scale);
  case E4M3: return put_row(x, dim, (e4m3 *)cache + place, scale);
  default: return put_row(x, dim, (e5m2 *)cache + place, scale);
  }
}

// One head by cos and sin [turned]: to[i] = x[i] cos[i] + partner(i) sin[i]; the rest as it is. `to` may be x.
template <class T>
void turn_head(const T *x, const float *cos, const float *sin, const Turn &t, T *to) {
  float from[1024];
  for (int64_t d = 0; d < t.dim; d += 16) store(from + d, widen(x + d, t.dim - d));
  int64_t middle = t.turned / 2;
  for (int64_t d = 0; d < t.turned; d += 16) {
    float partner[16] = {};
    int64_t count = std::min<int64_t>(16, t.turned - d);
    if (t.interleaved)
      for (int64_t i = 0; i < count; i++) partner[i] = from[(d + i) ^ 1];
    else
      for (int64_t i = 0; i < count; i++) partner[i] = from[d + i < middle ? d + i + middle : d + i - middle];
    F16 y = rounded_to<T>(load<F16>(from + d) * load<F16>(cos + d)) + load<F16>(partner) * load<F16>(sin + d);
    narrow(to + d, y, count);
  }
  if (to != x && t.turned < t.dim) std::memcpy((void *)(to + t.turned), x + t.turned, (t.dim - t.turned) * sizeof(T));
}

template <class T>
void turns(T *q, const T *k, const T *v, const T *cos, const T *sin, const Cache &cache, const Turn &t, int64_t rows, int64_t threads) {
  by_rows(threads, rows, (t.heads + 2 * t.keys) * t.dim, [&](int64_t r) {
    float c[1024], s[1024];
    T turned[1024];
    for (int64_t d = 0; d < t.turned; d += 16) {
      store(c + d, widen(cos + r * t.turned + d, t.turned - d));
      store(s + d, widen(sin + r * t.turned + d, t.turned - d));
    }
    T *query = q + r * t.q_row;
    for (int64_t h = 0; h < t.heads; h++, query += t.dim) turn_head(query, c, s, t, query);
    int64_t number = t.slots[r] / cache.block_size, within = t.slots[r] % cache.block_size;
    int64_t place = number * cache.block + within * cache.slot, at = number * cache.scale_block + within * cache.scale_slot;
    for (int64_t h = 0; h < t.keys; h++, place += cache.head, at += cache.scale_head) {
      turn_head(k + r * t.k_row + h * t.dim, c, s, t, turned);
      put(turned, t.dim, cache.type, cache.k, place, cache.k_scales + at);
      put(v + r * t.v_row + h * t.dim, t.dim, cache.type, cache.v, place, cache.v_scales + at);
    }
  });
}

// One row of logits, with -infinity wherever bit v % 32 of word v / 32 is 0; no words: as it is.
void allow_row(const float *x, const uint32_t *words, float *out, int64_t width) {
  const I16 place = places();
  const F16 barred = splat(-INFINITY);
  for (int64_t v = 0; v < width; v += 16) {
    uint32_t bits = words ? words[v / 32] >> v % 32 & 0xffff : 0xffff;
    if (!bits)
      narrow(out + v, barred, width - v);
    else
      narrow(out + v, where(((splat_bits(bits) >> place) & 1) != 0, widen(x + v, width - v), barred), width - v);
  }
}

// The same where the row lies. Words of which all bits are set are passed by.
void bar_row(float *x, const uint32_t *words, int64_t width) {
  const I16 place = places();
  const F16 barred = splat(-INFINITY);
  for (int64_t from = 0; from < width; from += 32) {
    uint32_t bits = words[from / 32];
    if (bits == ~0u) continue;
    for (int64_t v = from; v < std::min(width, from + 32); v += 16, bits >>= 16)
      narrow(x + v, where(((splat_bits(bits) >> place) & 1) != 0, widen(x + v, width - v), barred), width - v);
  }
}

// The first of the largest of one row whose bits are set; 0 when none is more than -infinity. By words: where little is
// allowed most have no bit, and where much is most have all.
int64_t best_of_row(const float *x, const uint32_t *words, int64_t width) {
  const I16 place = places();
  F16 best[2] = {splat(-INFINITY), splat(-INFINITY)}; // of each word's halves, so that none waits for the other
  I16 at[2] = {};
  for (int64_t from = 0; from < width; from += 32) {
    uint32_t bits = words[from / 32];
    if (!bits) continue;
    int64_t left = width - from;
    if (left < 32) bits &= (1u << left) - 1;
    for (int h = 0; h < 2 && (bits >> 16 * h); h++) {
      F16 y = left < 32 ? widen(x + from + 16 * h, left - 16 * h) : widen(x + from + 16 * h);
      I16 more = y > best[h];
      if (bits != ~0u) more = more & (((splat_bits(bits >> 16 * h) >> place) & 1) != 0);
      best[h] = where(more, y, best[h]);
      at[h] = where(more, place + (int32_t)(from + 16 * h), at[h]);
    }
  }
  int64_t found = 0;
  float most = -INFINITY;
  for (int i = 0; i < 32; i++) {
    float y = best[i / 16][i % 16];
    int64_t first = at[i / 16][i % 16];
    if (y > most || (y == most && y > -INFINITY && first < found)) most = y, found = first;
  }
  return found;
}

} // namespace

// logits[R, V], a row every `x_row` numbers -> out[R, V]; which[R]: the row of mask[N, W] that holds there, or -1.
EXPORT void allow(const float *x, int64_t x_row, const int64_t *which, const uint32_t *mask, int64_t words, float *out, int64_t rows,
                  int64_t width, int64_t threads) {
  by_rows(threads, rows, width, [&](int64_t r) {
    allow_row(x + r * x_row, which[r] < 0 ? nullptr : mask + which[r] * words, out + r * width, width);
  });
}

// which[N] rows of logits[R, V] themselves, by mask[N, W].
EXPORT void bar(float *x, int64_t x_row, const int64_t *which, const uint32_t *mask, int64_t words, int64_t rows, int64_t width,
                int64_t threads) {
  by_rows(threads, rows, width, [&](int64_t r) { bar_row(x + which[r] * x_row, mask + r * words, width); });
}

// Of which[N] rows of logits[R, V] the best number that mask[N, W] leaves -> out[N].
EXPORT void best_allowed(const float *x, int64_t x_row, const int64_t *which, const uint32_t *mask, int64_t words, int64_t *out,
                         int64_t rows, int64_t width, int64_t threads) {
  by_rows(threads, rows, width, [&](int64_t r) { out[r] = best_of_row(x + which[r] * x_row, mask + r * words, width); });
}

// Types: 0 float32, 1 bfloat16, 2 float16.
#define BY_TYPE(type, call)                                                                                                \
  if (type == 0) {                                                                                                         \
    typedef float T;                                                                                                       \
    call;                                                                                                                  \
  } else if (type == 1) {                                                                                                  \
    typedef bf16 T;                                                                                                        \
    call;                                                                                                                  \
  } else {                                                                                                                 \
    typedef fp16 T;                                                                                                        \
    call;                                                                                                                  \
  }

// x (rows `inner` by `inner` `outer` numbers apart, x_row within) + scale * y[T, M] -> total, and its norm -> out. y null: the
// norm of x alone.
EXPORT void rms_norm(int64_t type, const void *x, int64_t outer, int64_t inner, int64_t x_row, const void *y, double scale, const void *weight, double offset,
                     double eps, void *total, void *out, int64_t rows, int64_t width, int64_t threads) {
  BY_TYPE(type, norms((const T *)x, outer, inner, x_row, (const T *)y, (float)scale, (const T *)weight, (float)offset, (float)eps,
                      (T *)total, (T *)out, rows, width, threads))
}

// x[T, 2 F] -> out[T, F]. kind: 0 silu, 1 gelu by tanh, 2 clamped by the limit.
EXPORT void gated(int64_t type, const void *x, void *out, int64_t rows, int64_t width, int64_t kind, double limit, int64_t threads) {
  BY_TYPE(type, gates((const T *)x, (T *)out, rows, width, kind, (float)limit, threads))
}

// q[T, H, D] turned in place, k[T, K, D] turned and written to its slots, v written; each has its own distance of rows.
EXPORT void turn_and_write(int64_t type, void *q, int64_t q_row, const void *k, int64_t k_row, const void *v, int64_t v_row,
                           const void *cos, const void *sin, const Cache *cache, const int64_t *slots, int64_t rows,
                           int64_t heads, int64_t keys, int64_t dim, int64_t turned, int64_t interleaved, int64_t threads) {
  Turn t{q_row, k_row, v_row, heads, keys, dim, turned, interleaved, slots};
  BY_TYPE(type, turns((T *)q, (const T *)k, (const T *)v, (const T *)cos, (const T *)sin, *cache, t, rows, threads))
}
