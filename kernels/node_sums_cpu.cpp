// Two parts per rank, used in turn: who has written turn n has read everything of n - 1, so once all have, n + 1 may be written.
// A rank spins for a while, since the others are only microseconds behind where each has a core, then sleeps (Linux: futex).
#include "node_sums.h"

#include <algorithm>

namespace {

constexpr int64_t NAP_NS = 20'000'000; // an abort is seen after so long at the latest
constexpr int64_t TWO_TURNS = 1 << 15; // bytes from which three ranks or more add up a part of the sum each

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

void pause_a_little() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Until this rank has written `turn`.
Met wait_for(Meeting *m, int64_t rank, uint32_t turn) {
  Counter &c = m->shared->counters[rank];
  if (reached(c, turn)) return MET;
  int64_t begin = now();
  do {
    for (int i = 0; i < 16; i++, pause_a_little())
      if (reached(c, turn)) return MET;
  } while (now() - begin < m->spin_ns);
  Met found = MET;
  c.sleepers.fetch_add(1);
  for (uint32_t seen; !reached(c, turn);) {
    if (m->shared->aborted.load() || now() - begin > m->timeout_ns) {
      found = m->shared->aborted.load() ? ABORTED : TIMED_OUT;
      break;
    }
    seen = c.turn.load();
    if ((int32_t)(seen - turn) < 0) sleep_while(c.turn, seen, NAP_NS);
  }
  c.sleepers.fetch_sub(1);
  return found;
}

Met wait_for_all(Meeting *m, uint32_t turn) {
  for (int64_t rank = 0; rank < m->size; rank++)
    if (Met found = rank == m->own ? MET : wait_for(m, rank, turn)) return found;
  return MET;
}

char *part(const Meeting *m, int64_t rank) { return m->parts + ((m->turn & 1) * m->size + rank) * m->capacity; }

// The next turn begins: this rank's part may be written.
Met begin(Meeting *m) {
  m->turn++;
  return wait_for_all(m, (uint32_t)m->turn - 1);
}

// This rank's part is written.
void tell(Meeting *m) { advance(m->shared->counters[m->own], (uint32_t)m->turn); }

Met write(Meeting *m, const void *x, int64_t bytes) {
  if (Met found = begin(m)) return found;
  std::memcpy(part(m, m->own), x, bytes);
  tell(m);
  return MET;
}

template <class T>
void add(const Meeting *m, T *out, int64_t first, int64_t stop) {
  for (int64_t i = first; i < stop; i += 16) {
    F16 sum = widen((const T *)part(m, 0) + i, stop - i);
    for (int64_t rank = 1; rank < m->size; rank++) sum += widen((const T *)part(m, rank) + i, stop - i);
    narrow(out + i, sum, stop - i);
  }
}

// Numbers of a rank, whole vectors of them.
int64_t edge(int64_t numbers, int64_t rank, int64_t size) {
  return rank == size ? numbers : numbers / 16 * rank / size * 16;
}

template <class T>
Met sum_piece(Meeting *m, const T *x, T *out, int64_t numbers) {
  if (Met found = write(m, x, numbers * sizeof(T))) return found;
  if (Met found = wait_for_all(m, (uint32_t)m->turn)) return found;
  if (m->size == 2 || numbers * (int64_t)sizeof(T) < TWO_TURNS) {
    add(m, out, 0, numbers);
    return MET;
  }
  int64_t first = edge(numbers, m->own, m->size), stop = edge(numbers, m->own + 1, m->size);
  add(m, out, first, stop);
  if (Met found = write(m, out + first, (stop - first) * sizeof(T))) return found;
  for (int64_t rank = 0; rank < m->size; rank++) {
    if (Met found = rank == m->own ? MET : wait_for(m, rank, (uint32_t)m->turn)) return found;
    int64_t from = edge(numbers, rank, m->size);
    std::memcpy((void *)(out + from), part(m, rank), (edge(numbers, rank + 1, m->size) - from) * sizeof(T));
  }
  return MET;
}

template <class T>
Met sum(Meeting *m, const T *x, T *out, int64_t numbers) {
  int64_t most = m->capacity / (int64_t)sizeof(T);
  for (int64_t i = 0; i < numbers; i += most)
    if (Met found = sum_piece(m, x + i, out + i, std::min(most, numbers - i))) return found;
  return MET;
}

// own[numbers] = this rank's numbers of the sum of x[size * numbers].
template <class T>
Met scatter(Meeting *m, const T *x, T *own, int64_t numbers) {
  int64_t most = m->capacity / (int64_t)sizeof(T) / m->size / 16 * 16;
  for (int64_t i = 0; i < numbers; i += most) {
    int64_t count = std::min(most, numbers - i);
    if (Met found = begin(m)) return found;
    for (int64_t rank = 0; rank < m->size; rank++)
      std::memcpy((T *)part(m, m->own) + rank * most, x + rank * numbers + i, count * sizeof(T));
    tell(m);
    if (Met found = wait_for_all(m, (uint32_t)m->turn)) return found;
    for (int64_t k = 0; k < count; k += 16) {
      F16 sum = widen((const T *)part(m, 0) + m->own * most + k, count - k);
      for (int64_t rank = 1; rank < m->size; rank++) sum += widen((const T *)part(m, rank) + m->own * most + k, count - k);
      narrow(own + i + k, sum, count - k);
    }
  }
  return MET;
}

} // namespace

EXPORT int64_t sum_between(Meeting *m, int64_t type, const void *x, void *out, int64_t numbers) {
  if (type == FLOAT32) return sum(m, (const float *)x, (float *)out, numbers);
  if (type == BFLOAT16) return sum(m, (const bf16 *)x, (bf16 *)out, numbers);
  return sum(m, (const fp16 *)x, (fp16 *)out, numbers);
}

EXPORT int64_t scatter_between(Meeting *m, int64_t type, const void *x, void *own, int64_t numbers) {
  if (type == FLOAT32) return scatter(m, (const float *)x, (float *)own, numbers);
  if (type == BFLOAT16) return scatter(m, (const bf16 *)x, (bf16 *)own, numbers);
  return scatter(m, (const fp16 *)x, (fp16 *)own, numbers);
}

// x[bytes] of every rank -> whole[size][bytes]; null where a rank doesn't want it: then it goes on at once.
EXPORT int64_t gather_between(Meeting *m, const char *x, char *whole, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += m->capacity) {
    int64_t count = std::min(m->capacity, bytes - i);
    if (Met found = write(m, x + i, count)) return found;
    for (int64_t rank = 0; whole && rank < m->size; rank++) {
      if (Met found = rank == m->own ? MET : wait_for(m, rank, (uint32_t)m->turn)) return found;
      std::memcpy(whole + rank * bytes + i, part(m, rank), count);
    }
  }
  return MET;
}

// Any thread: whoever waits is told.
EXPORT void abort_between(Meeting *m) {
  m->shared->aborted.store(1);
  for (int64_t rank = 0; rank < m->size; rank++) wake(m->shared->counters[rank].turn);
}
