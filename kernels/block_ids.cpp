// Content ids of a prompt's blocks, and its tokens as they are hashed: see engine/blocks.py. On its own, so that a gateway has
// it within a second. BLAKE2b: RFC 7693; its four columns are the lanes of a vector.
#include <cstdint>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Of Python's stable interface.
struct _object;
extern "C" _object PyLong_Type;
extern "C" _object *PyList_GetItem(_object *, intptr_t);
extern "C" _object *PyLong_FromLong(long);
extern "C" unsigned long PyLong_AsUnsignedLong(_object *);
extern "C" void Py_DecRef(_object *);
// How CPython lays out lists and integers, which takes a quarter of the time of asking; looked at before it is believed.
struct _object {
  intptr_t references;
  const void *type;
  intptr_t size; // of an integer: its sign and how many digits of 30 bits it has, in one way or another
  union {
    _object **items;
    uint32_t digit;
  };
};

namespace {

typedef uint64_t Lanes __attribute__((vector_size(32)));

constexpr int64_t INPUT = 128, ID = 16, AHEAD = 48;
constexpr uint64_t START[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
                               0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};

template <int BITS> inline Lanes turned(Lanes x) {
#if defined(__AVX2__) && !defined(__AVX512VL__) // AVX-512 rotates; where there is neither a shuffle of bytes is slow
  typedef uint8_t Bytes __attribute__((vector_size(32)));
  constexpr int N = BITS / 8;
  Bytes from;
  for (int at = 0; at < 32; at++) from[at] = at / 8 * 8 + (at + N) % 8;
  if (BITS % 8 == 0) return (Lanes)__builtin_shuffle((Bytes)x, from);
#endif
  return x >> BITS | x << (64 - BITS);
}

template <int FIRST, int SECOND> inline void mix(Lanes &a, Lanes &b, Lanes &c, Lanes &d, Lanes words) {
  a += words, a += b; // b comes last
  d = turned<FIRST>(d ^ a);
  c += d;
  b = turned<SECOND>(b ^ c);
}

inline Lanes rotated1(Lanes x) { return __builtin_shuffle(x, (Lanes){1, 2, 3, 0}); }
inline Lanes rotated2(Lanes x) { return __builtin_shuffle(x, (Lanes){2, 3, 0, 1}); }
inline Lanes rotated3(Lanes x) { return __builtin_shuffle(x, (Lanes){3, 0, 1, 2}); }

template <int... S> inline void round(Lanes &a, Lanes &b, Lanes &c, Lanes &d, const uint64_t *m) {
  constexpr int s[] = {S...};
  mix<32, 24>(a, b, c, d, (Lanes){m[s[0]], m[s[2]], m[s[4]], m[s[6]]});
  mix<16, 63>(a, b, c, d, (Lanes){m[s[1]], m[s[3]], m[s[5]], m[s[7]]});
  a = rotated3(a), c = rotated1(c), d = rotated2(d); // the diagonals; b, for which everything waits, stays where it is
  mix<32, 24>(a, b, c, d, (Lanes){m[s[14]], m[s[8]], m[s[10]], m[s[12]]});
  mix<16, 63>(a, b, c, d, (Lanes){m[s[15]], m[s[9]], m[s[11]], m[s[13]]});
  a = rotated1(a), c = rotated3(c), d = rotated2(d);
}

// bytes: of the input so far
void compress(uint64_t *h, const uint64_t *m, uint64_t bytes, bool last) {
  Lanes a, b, c, d;
  std::memcpy(&a, h, 32), std::memcpy(&b, h + 4, 32), std::memcpy(&c, START, 32), std::memcpy(&d, START + 4, 32);
  const Lanes low = a, high = b;
  d ^= (Lanes){bytes, 0, last ? ~uint64_t(0) : 0, 0};
  round<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(a, b, c, d, m);
  round<14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3>(a, b, c, d, m);
  round<11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4>(a, b, c, d, m);
  round<7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8>(a, b, c, d, m);
  round<9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13>(a, b, c, d, m);
  round<2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9>(a, b, c, d, m);
  round<12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11>(a, b, c, d, m);
  round<13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10>(a, b, c, d, m);
  round<6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5>(a, b, c, d, m);
  round<10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0>(a, b, c, d, m);
  round<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(a, b, c, d, m);
  round<14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3>(a, b, c, d, m);
  a ^= low ^ c, b ^= high ^ d;
  std::memcpy(h, &a, 32), std::memcpy(h + 4, &b, 32);
}

// id[16] of a block's tokens behind `before`
void hash(const uint8_t *before, const uint8_t *tokens, int64_t bytes, uint8_t *id) {
  uint64_t h[8], m[INPUT / 8];
  std::memcpy(h, START, sizeof h);
  h[0] ^= 0x01010000 ^ ID;
  uint8_t *input = (uint8_t *)m;
  std::memcpy(input, before, ID);
  int64_t filled = ID, all = 0;
  while (true) {
    const int64_t more = bytes < INPUT - filled ? bytes : INPUT - filled;
    std::memcpy(input + filled, tokens, more);
    tokens += more, bytes -= more, filled += more, all += filled;
    if (filled < INPUT) std::memset(input + filled, 0, INPUT - filled);
    compress(h, m, all, !bytes);
    if (!bytes) break;
    filled = 0;
  }
  std::memcpy(id, h, ID);
}

} // namespace

// ids[count][16] of blocks of so many bytes each, the first one behind `before`
EXPORT void block_ids(const uint8_t *before, const uint8_t *tokens, int64_t count, int64_t bytes, uint8_t *ids) {
  for (int64_t n = 0; n < count; n++, tokens += bytes, ids += ID) {
    hash(before, tokens, bytes, ids);
    before = ids;
  }
}

// What `size` is in an integer of one digit above 0; -1: integers aren't laid out like that.
static intptr_t one_digit() {
  _object *known = PyLong_FromLong(0x2abcdef1);
  const bool alike = known && known->type == &PyLong_Type && known->digit == 0x2abcdef1;
  const intptr_t found = alike ? known->size : -1;
  Py_DecRef(known);
  return found;
}

// Where the list has its items, if it and integers are laid out as we think.
static _object **items_of(_object *list, int64_t count) {
  static const intptr_t one = one_digit();
  const bool alike = one >= 0 && count && list->size >= count && list->items[0] == PyList_GetItem(list, 0);
  return alike ? list->items : nullptr;
}

// Four bytes a token of a list's first..stop; how many could be written before one that doesn't fit. The interpreter's lock is held.
EXPORT int64_t token_words(_object *list, int64_t first, int64_t stop, uint32_t *words) {
  static const intptr_t one = one_digit();
  _object **items = items_of(list, stop);
  for (int64_t n = first; n < stop; n++) {
    if (items && n + AHEAD < stop) __builtin_prefetch(items[n + AHEAD]);
    if (items && items[n]->type == &PyLong_Type && items[n]->size == one) {
      words[n - first] = items[n]->digit;
      continue;
    }
    const unsigned long token = PyLong_AsUnsignedLong(PyList_GetItem(list, n));
    if (token > UINT32_MAX) return n - first;
    words[n - first] = (uint32_t)token;
  }
  return stop - first;
}

// They will be asked for soon.
EXPORT void tokens_ahead(_object *list, int64_t first, int64_t stop) {
  if (_object **items = items_of(list, stop))
    for (int64_t n = first; n < stop; n++) __builtin_prefetch(items[n]);
}
