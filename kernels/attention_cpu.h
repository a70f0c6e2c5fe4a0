// What one thread does for attention: some rows of a sequence under some kv heads, tile of keys by tile.
#pragma once
#include "attention_eights.h"

#include <algorithm>
#include <type_traits>

namespace {

constexpr int64_t TILE = 64;   // keys whose scores a row takes at once
constexpr int64_t PART = 1024; // keys after which a row's softmax begins anew, to be merged: long contexts use all threads
constexpr int64_t QUERIES = 64; // query rows (of all heads of a group) that share a tile's keys
constexpr int64_t WIDEST = 1024; // heads of few rows, of which all zero is one
constexpr int64_t UNPACKED = 16; // query rows up to which pairs are read where they lie
constexpr int64_t FEW = 32;    // query rows up to which rows of bfloat16 aren't laid down as floats
constexpr int BLOCK = 6; // rows whose sums are in registers at once,
template <int R>           // so many times 16 columns of them; with few rows more, since a sum waits for itself
constexpr int COLUMNS = REGISTER == 64 || R == 1 ? 4 : R == 2 ? 2 : 1;

struct Unit { // some rows of one sequence under some kv heads, and some parts of their keys
  int32_t sequence, head, heads, first, count;
  int64_t part, parts;
  int64_t partial; // where its sums go, in floats; -1: it ends here
};

alignas(64) const uint16_t zeros[WIDEST] = {};

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Where the keys of a tile and their scales lie, in numbers from the cache's start; -1: not one of the sequence's.
struct Places {
  int64_t row[TILE], scale[TILE];
  int64_t count; // of the sequence's, whether they are seen or not
};

struct Call {
  int64_t type; // of queries and results
  const void *q;
  int64_t q_row, q_head;
  const Cache &cache;
  const int32_t *table;
  int64_t table_row;
  const int32_t *starts, *lengths;
  int64_t sequences, heads, kv_heads, dim, value_dim;
  float scale, softcap;
  int64_t window, chunk, causal;
  const float *sinks, *slopes;
  void *out;
  int64_t threads;

  // The keys that a row at this position of a sequence sees: low..high, both included.
  void range(int64_t length, int64_t position, int64_t &from, int64_t &to) const {
    from = 0, to = causal ? position : length - 1;
    if (window) {
      from = std::max(from, position - window + 1);
      to = std::min(to, position + window - 1);
    }
    if (chunk) {
      int64_t begin = position / chunk * chunk;
      from = std::max(from, begin), to = std::min(to, begin + chunk - 1);
    }
  }

  // Position of the unit's first row.
  int64_t origin(const Unit &u) const { return lengths[u.sequence] - (starts[u.sequence + 1] - starts[u.sequence]) + u.first; }

  // Keys in front of `first`, which nobody sees, may lie in blocks that belong to others by now.
  void find(int64_t sequence, int64_t tile, int64_t first, Places &places) const {
    int64_t number = tile / cache.block_size, within = tile % cache.block_size;
    const int32_t *blocks = table + sequence * table_row;
    places.count = std::max<int64_t>(0, std::min(TILE, lengths[sequence] - tile));
    for (int64_t j = 0; j < places.count; number++, within = 0) {
      int64_t row = blocks[number] * cache.block + (within - j) * cache.slot;
      int64_t scale = blocks[number] * cache.scale_block + (within - j) * cache.scale_slot;
      for (int64_t end = std::min(places.count, j + cache.block_size - within); j < end; j++)
        places.row[j] = row + j * cache.slot, places.scale[j] = scale + j * cache.scale_slot;
    }
    for (int64_t j = 0; j < std::min(places.count, first - tile); j++) places.row[j] = -1;
    for (int64_t j = places.count; j < TILE; j++) places.row[j] = -1;
  }
};

// T: the cache's type. PAIRS: bfloat16 queries, whose products with pairs of numbers are added up in float32; 8 bits are
// bfloat16 numbers too.
template <class T, bool PAIRS>
struct Worker {
  const Call &c;
  const Cache &cache;
  const Unit &u;
  const Unit *following;
  const int64_t group, rows, all, wide, length, origin; // rows: of one kv head; origin: position of the unit's first row
  float *kt, *vt, *scores, *weights, *acc, *total, *queries, *m, *total_m, *total_l;
  int64_t *low, *high;
  float k_scales[TILE], v_scales[TILE]; // of a tile's keys under the head at hand
  F16 *lanes;

  // Sums of a row.
  static int64_t columns(const Call &c) { return up(c.value_dim, PAIRS ? 32 : 16); }

  static int64_t bytes(const Call &c, int64_t rows, int64_t heads) {
    int64_t wide = columns(c), dim = up(c.dim, 16);
    return 4 * (TILE * (dim + wide) + rows * (2 * TILE + 4) + heads * rows * (2 * wide + dim + 16 + 3)) + 4096;
  }

  Worker(const Call &call, const Unit &unit, char *memory, const Unit *next = nullptr)
      : c(call), cache(call.cache), u(unit), following(next), group(c.heads / c.kv_heads), rows(unit.count * group),
        all(rows * unit.heads), wide(columns(c)), length(c.lengths[unit.sequence]), origin(call.origin(unit)) {
    auto take = [&](int64_t floats) {
      char *found = memory;
      memory += up(4 * floats, 64);
      return (float *)found;
    };
    kt = take(TILE * up(c.dim, 16)), vt = take(TILE * wide);
    scores = take(rows * TILE), weights = take(rows * TILE);
    low = (int64_t *)take(2 * rows), high = (int64_t *)take(2 * rows);
    acc = take(all * wide), total = take(all * wide), queries = take(all * up(c.dim, 16));
    lanes = (F16 *)take(all * 16);
    m = take(all), total_m = take(all), total_l = take(all);
  }

  // Row r of those under the unit's h-th kv head, all of whose query heads' rows stand together.
  int64_t row(int32_t r) const { return c.starts[u.sequence] + u.first + r / (int32_t)group; }
  int64_t head(int64_t h, int32_t r) const { return (u.head + h) * group + r % (int32_t)group; }
  int64_t query(int64_t h, int32_t r) const { return row(r) * c.q_row + head(h, r) * c.q_head; }
  const float *query_at(int64_t h, int32_t r) const { // or pairs
    return PAIRS ? (const float *)((const bf16 *)c.q + query(h, r)) : queries + (h * rows + r) * up(c.dim, 16);
  }

  // The keys that a row at this position sees: low..high, both included.
  void range(int64_t position, int64_t &from, int64_t &to) const { c.range(length, position, from, to); }

  // Where what the thread probably takes next begins, seen from this unit's first head.
  void find_following(Places &places) const {
    for (int64_t &row : places.row) row = -1;
    if (!following) return;
    int64_t from, to;
    c.range(c.lengths[following->sequence], c.origin(*following), from, to);
    c.find(following->sequence, std::max(following->part * PART, from / TILE * TILE), from, places);
    for (int64_t j = 0; j < places.count; j++) places.row[j] += (following->head - u.head) * cache.head;
  }

  const T *at(const void *numbers, int64_t place, int64_t h) const {
    return place < 0 ? nullptr : (const T *)numbers + place + (u.head + h) * cache.head;
  }

  void find_scales(const Places &places, int64_t h) {
    for (int64_t j = 0; j < TILE; j++) {
      k_scales[j] = v_scales[j] = 0.0f;
      if (places.row[j] < 0) continue;
      int64_t at = places.scale[j] + (u.head + h) * cache.scale_head;
      k_scales[j] = cache.k_scales[at];
      v_scales[j] = cache.v ? cache.v_scales[at] : k_scales[j];
    }
  }

  static void prefetch(const T *row, int64_t dim) {
    for (int64_t b = 0; row && b < dim * (int64_t)sizeof(T); b += 64) __builtin_prefetch((const char *)row + b, 0, 2);
  }

#if KVASIR_PAIRS
  // `left` of 32 numbers as bfloat16, the rest 0.
  static __m512i pairs(const T *from, int64_t left) {
    if constexpr (std::is_same_v<T, bf16>) {
      return _mm512_maskz_loadu_epi16(left >= 32 ? 0xffffffffu : (1u << left) - 1, from);
    } else {
      F16 low = widen(from, left), high = left > 16 ? widen(from + 16, left - 16) : splat(0.0f);
      return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    }
  }
#endif

  Later later(const void *numbers, const Places &places, int64_t h, int64_t width) const {
    return {(const char *)((const T *)numbers + (u.head + h) * cache.head), places.row, sizeof(T), width * (int64_t)sizeof(T)};
  }

  // run(integral_constant of `count`), count <= MOST.
  template <int MOST, class Run>
  static void by_count(int64_t count, Run run) {
    if constexpr (MOST > 1)
      if (count < MOST) return by_count<MOST - 1>(count, run);
    run(std::integral_constant<int, MOST>());
  }

  // Where a tile's rows begin under a head; a row of zeros for what isn't there or seen.
  void rows_of(const void *numbers, const Places &places, int64_t h, const T **found) const {
    const T *base = (const T *)numbers + (u.head + h) * cache.head;
    for (int64_t j = 0; j < TILE; j++) found[j] = places.row[j] < 0 ? (const T *)zeros : base + places.row[j];
  }

#if KVASIR_PAIRS
  // Pairs of two rows' 32 numbers, in the order that costs least: columns 0 to 3, 8 to 11, 16 to 19, 24 to 27, then the others.
  static void side_by_side(__m512i a, __m512i b, F16 *to) {
    to[0] = (F16)_mm512_unpacklo_epi16(a, b), to[1] = (F16)_mm512_unpackhi_epi16(a, b);
  }

  // Columns 8 of 16 rows from their d-th pair on, side by side.
  static __attribute__((always_inline)) void eight(const T *const *rows, int64_t d, __m512 *to) {
    auto half = [&](int i) { return _mm256_loadu_ps((const float *)(rows[i] + 2 * d)); };
    __m512 r[8], t[8];
    for (int i = 0; i < 4; i++) {
      r[i] = _mm512_insertf32x8(_mm512_castps256_ps512(half(i)), half(i + 4), 1);
      r[i + 4] = _mm512_insertf32x8(_mm512_castps256_ps512(half(i + 8)), half(i + 12), 1);
    }
    for (int i = 0; i < 8; i += 2) t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; j++) {
        r[i + 2 * j] = (__m512)_mm512_unpacklo_pd((__m512d)t[i + j], (__m512d)t[i + j + 2]);
        r[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd((__m512d)t[i + j], (__m512d)t[i + j + 2]);
      }
    for (int i = 0; i < 4; i++)
      to[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88), to[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
  }

  // What pack_keys and multiply do, for so few rows that a tile isn't worth laying down: each sum in the same order. As many
  // keys at once as it takes that no sum waits for itself.
  template <int R>
  void few_keys(const Places &places, int64_t h, Later &later, const float *const *from, float *to) {
    constexpr int G = 2;
    const T *keys[TILE];
    rows_of(cache.k, places, h, keys);
    for (int64_t j = 0; j < places.count; j += 16 * G) {
      F16 sums[G][R];
      for (int g = 0; g < G; g++)
        for (int r = 0; r < R; r++) sums[g][r] = splat(0.0f);
      for (int64_t d = 0; d < c.dim / 2; d += 8) {
        later.step();
        __m512 k[G][8];
        for (int g = 0; g < G; g++) eight(keys + j + 16 * g, d, k[g]);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
          for (int r = 0; r < R; r++) {
            float q = load<float>(from[r] + d + i);
            for (int g = 0; g < G; g++) sums[g][r] = product(sums[g][r], q, (F16)k[g][i]);
          }
      }
      for (int g = 0; g < G; g++)
        for (int r = 0; r < R; r++) store(to + r * TILE + j + 16 * g, sums[g][r]);
    }
  }

  // The same of pack_values: to[R][wide] += from[R][TILE / 2 pairs] times the values, 16 * C columns at a time.
  template <int R, int C>
  void few_values(const Places &places, int64_t h, Later &later, const float *const *from, float *to) {
    const T *rows[TILE];
    rows_of(cache.v ? cache.v : cache.k, places, h, rows);
    for (int64_t d = 0; d < wide; d += 16 * C) {
      F16 sums[R][C];
      for (int r = 0; r < R; r++)
        for (int i = 0; i < C; i++) sums[r][i] = load<F16>(to + r * wide + d + 16 * i);
      for (int64_t j = 0; j < places.count; j += 2) {
        if (j % 4 == 0) later.step();
        F16 v[C];
        for (int64_t i = 0; i < C; i += 2)
          side_by_side(pairs(rows[j] + d + 16 * i, 32), pairs(rows[j + 1] + d + 16 * i, 32), v + i);
        for (int r = 0; r < R; r++)
          for (int i = 0; i < C; i++) sums[r][i] = product(sums[r][i], load<float>(from[r] + j / 2), v[i]);
      }
      for (int r = 0; r < R; r++)
        for (int i = 0; i < C; i++) store(to + r * wide + d + 16 * i, sums[r][i]);
    }
  }

  // A tile that isn't laid down, four rows at a time. Keys and values are called for a head ahead: half of one is too little
  // for memory to be always at work.
  void few(int64_t tile, const Places &places, int64_t h, const Places &next, int64_t next_h) {
    int64_t base = h * rows, pieces = (rows + 3) / 4;
    const float *from[4];
    auto by_rows = [&](auto run) {
      for (int64_t i = 0; i < rows; i += 4) by_count<4>(std::min<int64_t>(4, rows - i), [&](auto n) { run(n, i); });
    };
    Later keys = later(cache.k, next, next_h, c.dim), values = cache.v ? later(cache.v, next, next_h, c.value_dim) : Later{};
    keys.plan(TILE, pieces * TILE / 32 * c.dim / 16);
    by_rows([&](auto n, int64_t i) {
      for (int r = 0; r < n.value; r++) from[r] = query_at(h, i + r);
      few_keys<n.value>(places, h, keys, from, scores + i * TILE);
    });
    values.plan(TILE / 4, rows);
    for (int64_t i = 0; i < rows; i++) values.step(), weigh(h, i, tile); // memory had nothing to do meanwhile
    bool four = wide % 64 == 0;
    values.plan(TILE - values.called, pieces * wide / (four ? 64 : 32) * TILE / 4);
    by_rows([&](auto n, int64_t i) {
      for (int r = 0; r < n.value; r++) from[r] = weights + (i + r) * TILE;
      float *to = acc + (base + i) * wide;
      four ? few_values<n.value, 4>(places, h, values, from, to) : few_values<n.value, 2>(places, h, values, from, to);
    });
  }
#endif

  // Scores of a tile for a row become weights; what was summed before is scaled to the new largest score.
  __attribute__((noinline)) void weigh(int64_t h, int32_t r, int64_t tile) {
    F16 x[4];
    const int64_t i = h * rows + r;
    float *s = scores + r * TILE, *w = weights + r * TILE;
    const I16 number = places();
    int32_t from = (int32_t)(low[r] - tile), to = (int32_t)(high[r] - tile);
    bool whole = from <= 0 && to >= TILE - 1;
    float slope = c.slopes ? c.slopes[head(h, r)] : 0.0f;
    float behind = c.slopes ? (float)(origin + r / (int32_t)group - tile) : 0.0f;
    F16 best = splat(-INFINITY);
    for (int j = 0; j < 4; j++) {
      x[j] = load<F16>(s + 16 * j) * c.scale;
      if (scaled<T>) x[j] *= load<F16>(k_scales + 16 * j);
      if (c.softcap != 0.0f) x[j] = tangent(x[j] / c.softcap) * c.softcap;
      I16 key = number + 16 * j;
      if (c.slopes) {
        F16 distance = behind - convert<F16>(key);
        x[j] -= slope * where(distance < 0.0f, -distance, distance);
      }
      if (!whole) x[j] = where((key >= from) & (key <= to), x[j], splat(-INFINITY));
      best = larger(x[j], best);
    }
    float now = largest(best);
    if (!(now > m[i])) now = m[i];
    float against = now == -INFINITY ? 0.0f : now; // nothing seen yet: all weights are 0, but a NaN's
    if (now != m[i]) {
      F16 shrink = exponential(splat(m[i] - now));
      lanes[i] *= shrink;
      for (int64_t d = 0; d < wide; d += 16) store(acc + i * wide + d, load<F16>(acc + i * wide + d) * shrink);
      m[i] = now;
    }
    for (int j = 0; j < 4; j++) {
      F16 e = exponential(x[j] - against);
      lanes[i] += e;
      if (scaled<T>) e *= load<F16>(v_scales + 16 * j);
      if (PAIRS)
        narrow((bf16 *)w + 16 * j, e);
      else
        store(w + 16 * j, e);
    }
  }

#if KVASIR_EIGHTS
  // A tile's rows of `width` numbers: where they lie if `there`, else laid down in `room` as floats.
  template <class K>
  void rows_of(const void *numbers, int64_t width, bool there, float *room, const Places &places, int64_t h,
               const K **found) const {
    if constexpr (std::is_same_v<K, T>)
      if (there) return rows_of(numbers, places, h, found);
    int64_t line = up(width, 16);
    for (int64_t j = 0; j < places.count; j++) {
      const T *from = at(numbers, places.row[j], h);
      for (int64_t d = 0; d < width; d += 16) {
        F16 x = from ? widen(from + d, width - d) : splat(0.0f);
        store(room + j * line + d, in_order<T>(x));
      }
    }
    for (int64_t j = 0; j < TILE; j++) found[j] = (const K *)(room + std::min(j, places.count - 1) * line);
  }

  // A tile by rows of type K, so many query rows at a time: the first ones call for what is read next.
  template <class K, int MOST>
  void one_tile(bool there, int64_t tile, const Places &places, int64_t h, const Places &next, int64_t next_h) {
    const K *found[TILE];
    const float *from[MOST];
    auto by_rows = [&](Later meanwhile, auto run) {
      for (int64_t i = 0; i < rows; i += MOST, meanwhile.bytes = 0)
        by_count<MOST>(std::min<int64_t>(MOST, rows - i), [&](auto n) { run(n, i, meanwhile); });
    };
    Later values = cache.v ? later(cache.v, places, h, c.value_dim) : Later{}, keys = later(cache.k, next, next_h, c.dim);
    rows_of(cache.k, c.dim, there, kt, places, h, found);
    int64_t base = h * rows, dim = up(c.dim, 16);
    by_rows(values, [&](auto n, int64_t i, const Later &meanwhile) {
      for (int r = 0; r < n.value; r++) from[r] = query_at(h, i + r);
      score_rows<n.value>(found, places.count, meanwhile, from, dim, scores + i * TILE, TILE);
    });
    for (int64_t i = 0; i < rows; i++) weigh(h, i, tile);
    if (cache.v) rows_of(cache.v, c.value_dim, there, vt, places, h, found);
    by_rows(keys, [&](auto n, int64_t i, const Later &meanwhile) {
      for (int r = 0; r < n.value; r++) from[r] = weights + (i + r) * TILE;
      add_values<n.value>(found, places.count, meanwhile, from, wide, acc + (base + i) * wide, wide);
    });
  }

  void one_tile(int64_t tile, const Places &places, int64_t h, const Places &next, int64_t next_h) {
    if (scaled<T>) find_scales(places, h);
    bool there = c.dim % 16 == 0 && c.value_dim % 16 == 0 && std::max(c.dim, c.value_dim) * sizeof(T) <= sizeof zeros;
    if constexpr (std::is_same_v<T, bf16>)
      if (there && rows <= FEW) return one_tile<bf16, 4>(true, tile, places, h, next, next_h);
    one_tile<float, BLOCK>(std::is_same_v<T, float> && there, tile, places, h, next, next_h);
  }
#else
  // kt[dim (pairs)][TILE]: keys of a tile side by side; keys beyond the sequence are zero.
  // Meanwhile those of a later head or tile are called for.
  void pack_keys(const Places &places, int64_t h, const Places &next, int64_t next_h) {
    int64_t dims = PAIRS ? c.dim / 2 : c.dim;
    for (int64_t j = 0; j < TILE; j += 16) {
      const T *from[16];
      for (int64_t i = 0; i < 16; i++)
        from[i] = at(cache.k, places.row[j + i], h), prefetch(at(cache.k, next.row[j + i], next_h), c.dim);
#ifdef __AVX512F__
      for (int64_t d = 0; d < dims; d += 16) {
        __m512 r[16];
        for (int i = 0; i < 16; i++) {
          int64_t left = dims - d < 16 ? dims - d : 16;
          if (!from[i])
            r[i] = _mm512_setzero_ps();
#if KVASIR_PAIRS
          else if constexpr (PAIRS)
            r[i] = (__m512)pairs(from[i] + 2 * d, 2 * left);
#endif
          else
            r[i] = (__m512)widen(from[i] + d, left);
        }
        transpose(r);
        for (int64_t i = 0; i < 16 && d + i < dims; i++) store(kt + (d + i) * TILE + j, r[i]);
      }
#else
      for (int64_t i = 0; i < 16; i++)
        for (int64_t d = 0; d < dims; d += 16) {
          F16 x = from[i] ? widen(from[i] + d, dims - d) : splat(0.0f);
          for (int64_t e = 0; e < std::min<int64_t>(16, dims - d); e++) kt[(d + e) * TILE + j + i] = x[e];
        }
#endif
    }
  }

  // vt[TILE][wide], or vt[TILE / 2][wide] of pairs of neighbouring keys; zero beyond the sequence: 0 * NaN is NaN.
  void pack_values(const Places &places, int64_t h, const Places &next, int64_t next_h) {
    const void *numbers = cache.v ? cache.v : cache.k;
    for (int64_t j = 0; j < TILE; j += PAIRS ? 2 : 1) {
      const T *from = at(numbers, places.row[j], h);
      if (cache.v)
        for (int64_t i = 0; i < (PAIRS ? 2 : 1); i++) prefetch(at(numbers, next.row[j + i], next_h), c.value_dim);
#if KVASIR_PAIRS
      if constexpr (PAIRS) {
        const T *other = at(numbers, places.row[j + 1], h);
        for (int64_t d = 0; d < wide; d += 32) {
          __m512i a = from ? pairs(from + d, c.value_dim - d) : _mm512_setzero_si512();
          __m512i b = other ? pairs(other + d, c.value_dim - d) : _mm512_setzero_si512();
          F16 both[2];
          side_by_side(a, b, both);
          std::memcpy(vt + j / 2 * wide + d, both, sizeof both);
        }
        continue;
      }
#endif
      for (int64_t d = 0; d < wide; d += 16)
        store(vt + j * wide + d, from ? widen(from + d, c.value_dim - d) : splat(0.0f));
    }
  }

  static F16 product(F16 sum, float a, F16 b) {
#if KVASIR_PAIRS
    if constexpr (PAIRS) {
      uint32_t pair;
      std::memcpy(&pair, &a, 4);
      return (F16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)pair), (__m512bh)b);
    }
#endif
    return sum + a * b;
  }

  // to[R][columns..] += from[R][inner] (rows `step` apart) times tile[inner][line], for 16 * C columns.
  template <int R, int C>
  static void multiply(const float *const *from, int64_t inner, const float *tile, int64_t line, float *to, int64_t to_row,
                       bool add) {
    F16 sums[R][C];
    for (int r = 0; r < R; r++)
      for (int i = 0; i < C; i++) sums[r][i] = add ? load<F16>(to + r * to_row + 16 * i) : splat(0.0f);
    for (int64_t p = 0; p < inner; p++) {
      F16 b[C];
      for (int i = 0; i < C; i++) b[i] = load<F16>(tile + p * line + 16 * i);
      for (int r = 0; r < R; r++) {
        float a;
        std::memcpy(&a, from[r] + p, 4);
        for (int i = 0; i < C; i++) sums[r][i] = product(sums[r][i], a, b[i]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int i = 0; i < C; i++) store(to + r * to_row + 16 * i, sums[r][i]);
  }

  // The same for all columns[16].
  template <int R>
  static void strip(const float *const *from, int64_t inner, const float *tile, int64_t line, float *to, int64_t to_row,
                    int64_t columns, bool add) {
    constexpr int C = COLUMNS<R>;
    int64_t i = 0;
    for (; i + C <= columns; i += C) multiply<R, C>(from, inner, tile + 16 * i, line, to + 16 * i, to_row, add);
    if constexpr (C > 1)
      for (; i < columns; i++) multiply<R, 1>(from, inner, tile + 16 * i, line, to + 16 * i, to_row, add);
  }

  static void strips(int64_t count, const float *const *from, int64_t inner, const float *tile, int64_t line, float *to,
                     int64_t to_row, int64_t columns, bool add) {
    switch (count) {
    case 1: return strip<1>(from, inner, tile, line, to, to_row, columns, add);
    case 2: return strip<2>(from, inner, tile, line, to, to_row, columns, add);
    case 3: return strip<3>(from, inner, tile, line, to, to_row, columns, add);
    case 4: return strip<4>(from, inner, tile, line, to, to_row, columns, add);
    case 5: return strip<5>(from, inner, tile, line, to, to_row, columns, add);
    default: return strip<6>(from, inner, tile, line, to, to_row, columns, add);
    }
  }

  void one_tile(int64_t tile, const Places &places, int64_t h, const Places &next, int64_t next_h) {
    if (scaled<T>) find_scales(places, h);
#if KVASIR_PAIRS
    if constexpr (PAIRS && std::is_same_v<T, bf16>) { // the compiler's time is not worth it for other types
      if (rows <= UNPACKED && c.dim % 32 == 0 && c.value_dim % 32 == 0 && std::max(c.dim, c.value_dim) <= WIDEST)
        return few(tile, places, h, next, next_h);
    }
#endif
    pack_keys(places, h, next, next_h);
    int64_t inner = PAIRS ? c.dim / 2 : c.dim, base = h * rows;
    const float *from[BLOCK];
    for (int64_t i = 0; i < rows; i += BLOCK) {
      int64_t count = std::min<int64_t>(BLOCK, rows - i);
      for (int64_t r = 0; r < count; r++) from[r] = query_at(h, i + r);
      strips(count, from, inner, kt, TILE, scores + i * TILE, TILE, TILE / 16, false);
    }
    for (int64_t i = 0; i < rows; i++) weigh(h, i, tile);
    pack_values(places, h, next, next_h);
    for (int64_t i = 0; i < rows; i += BLOCK) {
      int64_t count = std::min<int64_t>(BLOCK, rows - i);
      for (int64_t r = 0; r < count; r++) from[r] = weights + (i + r) * TILE;
      strips(count, from, PAIRS ? TILE / 2 : TILE, vt, wide, acc + (base + i) * wide, wide, wide / 16, true);
    }
  }
#endif

  // One part's sums, from nothing: tile by tile under all heads, whose keys are neighbours in a block.
  void one_part(int64_t part, int64_t first, int64_t last) {
    for (int64_t i = 0; i < all; i++) m[i] = -INFINITY, lanes[i] = splat(0.0f);
    std::memset(acc, 0, all * wide * 4);
    int64_t begin = std::max(part * PART, first / TILE * TILE), end = std::min((part + 1) * PART, last + 1);
    Places places[2];
    c.find(u.sequence, begin, first, places[0]);
    for (int64_t tile = begin, turn = 0; tile < end; tile += TILE, turn ^= 1) {
      if (tile + TILE < end)
        c.find(u.sequence, tile + TILE, first, places[turn ^ 1]);
      else
        find_following(places[turn ^ 1]);
      for (int64_t h = 0; h < u.heads; h++) {
        bool last = h + 1 == u.heads;
        one_tile(tile, places[turn], h, places[turn ^ last], last ? 0 : h + 1);
      }
    }
  }

  // A row's sums of columns d to d + 15.
  static F16 ordered(const float *row, int64_t d) {
#if KVASIR_PAIRS
    if constexpr (PAIRS) { // side_by_side's order
      const __m512i order = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
      const float *both = row + d / 32 * 32;
      __m512i which = _mm512_add_epi32(order, _mm512_set1_epi32(d % 32 / 2));
      return (F16)_mm512_permutex2var_ps(_mm512_loadu_ps(both), which, _mm512_loadu_ps(both + 16));
    }
#endif
    return in_order<T, true>(load<F16>(row + d));
  }

  F16 numbers_of(const void *q, int64_t at, int64_t left) const {
    if (c.type == FLOAT32) return widen((const float *)q + at, left);
    return c.type == BFLOAT16 ? widen((const bf16 *)q + at, left) : widen((const fp16 *)q + at, left);
  }

  void prepare(int64_t &first, int64_t &last) {
    first = length, last = 0;
    for (int64_t i = 0; i < rows; i++) {
      range(origin + i / group, low[i], high[i]);
      first = std::min(first, low[i]), last = std::max(last, high[i]);
    }
    for (int64_t i = 0; i < all; i++) {
      total_m[i] = -INFINITY, total_l[i] = 0.0f;
      if (!PAIRS)
        for (int64_t d = 0; d < c.dim; d += 16)
          store(queries + i * up(c.dim, 16) + d, in_order<T>(numbers_of(c.q, query(i / rows, i % rows) + d, c.dim - d)));
    }
    std::memset(total, 0, all * wide * 4);
  }

  // What a part found joins what the parts before it found. One copy of the code, so that it always rounds alike.
  __attribute__((noinline)) void merge(int64_t i, float part_m, float part_l, const float *part_acc) {
    if (part_m == -INFINITY && part_l == 0.0f) return;
    float now = std::max(total_m[i], part_m);
    float old = total_m[i] == -INFINITY ? 0.0f : exponential(splat(total_m[i] - now))[0];
    float own = exponential(splat(part_m - now))[0];
    total_l[i] = total_l[i] * old + part_l * own;
    for (int64_t d = 0; d < wide; d += 16) {
      float *t = total + i * wide + d;
      store(t, load<F16>(t) * old + load<F16>(part_acc + d) * own);
    }
    total_m[i] = now;
  }

  __attribute__((noinline)) void finish() {
    for (int64_t i = 0; i < all; i++) {
      int64_t head = this->head(i / rows, i % rows);
      float sum = total_l[i], factor = 1.0f;
      if (c.sinks) {
        float sink = c.sinks[head], now = std::max(total_m[i], sink);
        factor = exponential(splat(total_m[i] - now))[0];
        sum = sum * factor + exponential(splat(sink - now))[0];
      }
      factor /= sum;
      int64_t to = (row(i % rows) * c.heads + head) * c.value_dim;
      for (int64_t d = 0; d < c.value_dim; d += 16) {
        F16 x = ordered(total + i * wide, d) * factor;
        if (c.type == FLOAT32)
          narrow((float *)c.out + to + d, x, c.value_dim - d);
        else if (c.type == BFLOAT16)
          narrow((bf16 *)c.out + to + d, x, c.value_dim - d);
        else
          narrow((fp16 *)c.out + to + d, x, c.value_dim - d);
      }
    }
  }

  // `partials`: where units leave [all][wide + 2] for each of their parts.
  void run(float *partials) {
    int64_t first, last;
    prepare(first, last);
    for (int64_t part = u.part; part < u.part + u.parts; part++) {
      one_part(part, first, last);
      for (int64_t i = 0; i < all; i++) {
        float l = sum(lanes[i]);
        if (u.partial < 0) {
          merge(i, m[i], l, acc + i * wide);
          continue;
        }
        float *to = partials + u.partial + i * (wide + 2);
        to[0] = m[i], to[1] = l;
        std::memcpy(to + 2, acc + i * wide, wide * 4);
      }
    }
    if (u.partial < 0) finish();
  }

  void join(const float *partials) {
    int64_t first, last;
    prepare(first, last);
    for (int64_t p = 0; p < u.parts; p++)
      for (int64_t i = 0; i < all; i++) {
        const float *from = partials + u.partial + (p * all + i) * (wide + 2);
        merge(i, from[0], from[1], from + 2);
      }
    finish();
  }
};

} // namespace
