// Attention over a paged cache, for CPUs. Keys are taken in tiles of 64 and in parts of 1024, at places that depend on their
// positions alone, and every sum runs in the order of keys or dimensions: a row's result is the same bit for bit whatever
// else is in the batch, and however its sequence was cut into chunks.
#include "attention_cpu.h"

#include <vector>

namespace {

thread_local Scratch scratch, sums;

// Kv heads that one thread takes together: all of them, for the sake of long reads, unless their rows leave the cache or the
// threads would be idle.
int64_t heads_at_once(const Call &c, int64_t units, int64_t rows) {
  if (rows > 16) return 1;
  int64_t pieces = std::min(c.kv_heads, (2 * c.threads + units - 1) / units);
  return (c.kv_heads + pieces - 1) / pieces;
}

// The rows that go together, the long ones first.
template <class T, bool PAIRS>
std::vector<Unit> divide(const Call &c, int64_t most) {
  std::vector<Unit> units;
  int64_t total = 0;
  for (int64_t s = 0; s < c.sequences; s++)
    total += (c.starts[s + 1] - c.starts[s] + most - 1) / most * ((c.lengths[s] + PART - 1) / PART);
  for (int32_t s = 0; s < c.sequences; s++) {
    int64_t count = c.starts[s + 1] - c.starts[s];
    if (!count) continue;
    int64_t step = heads_at_once(c, total, std::min(count, most) * (c.heads / c.kv_heads));
    for (int64_t first = (count - 1) / most * most; first >= 0; first -= most)
      for (int64_t h = 0; h < c.kv_heads; h += step) {
        Unit unit{s, (int32_t)h, (int32_t)std::min(step, c.kv_heads - h), (int32_t)first, (int32_t)std::min(most, count - first),
                  0, 0, -1};
        Worker<T, PAIRS> probe(c, unit, nullptr);
        int64_t from, to, begin = c.lengths[s], end = 0;
        for (int64_t i : {(int64_t)0, (int64_t)unit.count - 1}) {
          probe.range(probe.origin + i, from, to);
          begin = std::min(begin, from), end = std::max(end, to);
        }
        unit.part = begin / PART, unit.parts = end / PART - unit.part + 1;
        units.push_back(unit);
      }
  }
  return units;
}

// Rows, heads and, when those are few, parts of the keys, for the threads to share.
template <class T, bool PAIRS>
void attend(const Call &c) {
  int64_t group = c.heads / c.kv_heads, wide = Worker<T, PAIRS>::columns(c), most = std::max<int64_t>(1, QUERIES / group);
  std::vector<Unit> units = divide<T, PAIRS>(c, most), joined;
  int64_t room = 0;
  size_t bytes = 0;
  for (const Unit &unit : units)
    bytes = std::max(bytes, (size_t)Worker<T, PAIRS>::bytes(c, unit.count * group, unit.heads));
  // what would keep a thread for more than an eighth of its share is cut, and the longest come first: none is alone in the end
  auto work = [](const Unit &u) { return (int64_t)u.count * u.heads * u.parts; };
  int64_t whole = 0;
  for (const Unit &unit : units) whole += work(unit);
  if (c.threads > 1) {
    std::vector<Unit> cut;
    for (Unit unit : units) {
      if (unit.parts == 1 || 8 * c.threads * work(unit) <= whole) {
        cut.push_back(unit);
        continue;
      }
      unit.partial = room;
      joined.push_back(unit);
      int64_t step = unit.count * group * unit.heads * (wide + 2);
      for (int64_t p = 0; p < unit.parts; p++, room += step) {
        Unit part = unit;
        part.part += p, part.parts = 1, part.partial = room;
        cut.push_back(part);
      }
    }
    units.swap(cut);
    std::stable_sort(units.begin(), units.end(), [&](const Unit &a, const Unit &b) { return work(a) > work(b); });
  }
  float *partials = room ? (float *)sums.get(room * 4) : nullptr;
  auto memory = [&] { return (char *)scratch.get(bytes); };
  auto next = [&](int64_t i) { return i + c.threads < (int64_t)units.size() ? &units[i + c.threads] : nullptr; };
  share_out(c.threads, units.size(), [&](int64_t i) { Worker<T, PAIRS>(c, units[i], memory(), next(i)).run(partials); });
  share_out(c.threads, joined.size(), [&](int64_t i) { Worker<T, PAIRS>(c, joined[i], memory()).join(partials); });
}

} // namespace

// type: of q and out, FLOAT32 to FLOAT16.
EXPORT void attention(int64_t type, const void *q, int64_t q_row, int64_t q_head, const Cache *cache, const int32_t *table,
                      int64_t table_row, const int32_t *starts, const int32_t *lengths, int64_t sequences, int64_t heads,
                      int64_t kv_heads, int64_t dim, int64_t value_dim, double scale, double softcap, int64_t window,
                      int64_t chunk, int64_t causal, const float *sinks, const float *slopes, void *out, int64_t threads) {
  Call c{type, q, q_row, q_head, *cache, table, table_row, starts, lengths, sequences, heads, kv_heads, dim, value_dim,
         (float)scale, (float)softcap, window, chunk, causal, sinks, slopes, out, threads};
  bool pairs = KVASIR_PAIRS && type == BFLOAT16;
  switch (cache->type) {
  case FLOAT32: return attend<float, false>(c);
  case BFLOAT16: return pairs ? attend<bf16, KVASIR_PAIRS>(c) : attend<bf16, false>(c);
  case FLOAT16: return attend<fp16, false>(c);
  case INT8: return pairs ? attend<int8, KVASIR_PAIRS>(c) : attend<int8, false>(c);
  case E4M3: return pairs ? attend<e4m3, KVASIR_PAIRS>(c) : attend<e4m3, false>(c);
  default: return pairs ? attend<e5m2, KVASIR_PAIRS>(c) : attend<e5m2, false>(c);
  }
}
