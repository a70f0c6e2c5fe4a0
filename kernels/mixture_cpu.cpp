// A whole mixture in a single call: router, choice, experts, and the MLP that all rows share.
#include "mixture.h"

#include <type_traits>

extern "C" void gated(int64_t, const void *, void *, int64_t, int64_t, int64_t, double, int64_t);

namespace {

// Where intermediate results lie, one behind the other.
template <class T>
struct Room {
  uintptr_t begin, end;
  float *wide, *logits, *chances;
  int64_t *index;
  T *weight, *experts, *up, *gate, *shared, *factors;

  Room(const Mixture &m, int64_t rows, void *at) : begin((uintptr_t)at), end(begin) {
    const Routing &r = m.routing;
    int64_t hidden = m.facts->hidden, k = r.per_token, ffn = m.up.outputs / 2;
    take(wide, rows * hidden), take(logits, rows * r.count), take(chances, rows * k), take(index, rows * k);
    take(weight, rows * k), take(experts, rows * k * (hidden + 3 * m.facts->ffn));
    take(up, rows * 2 * ffn), take(gate, rows * ffn), take(shared, rows * hidden), take(factors, rows);
  }

  template <class N>
  void take(N *&place, int64_t count) {
    place = (N *)end;
    end += (count * sizeof(N) + 63) / 64 * 64;
  }
};

template <class To, class From>
void round_to(const From *from, To *to, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) narrow(to + i, widen(from + i, count - i), count - i);
}

// out += what all rows share, by how much it counts.
template <class T>
void add_shared(const Mixture &m, const Room<T> &room, const T *x, T *out, int64_t rows, int64_t alone, int64_t threads) {
  int64_t type = m.facts->type, hidden = m.facts->hidden, ffn = m.up.outputs / 2;
  product(type, x, m.up, room.up, rows, hidden, threads);
  gated(type, room.up, room.gate, rows, ffn, m.facts->gate, m.facts->limit, threads);
  product(type, room.gate, m.down, room.shared, rows, ffn, threads);
  if (m.gate.weights) {
    product(type, x, m.gate, room.factors, rows, hidden, threads);
    for (int64_t r = 0; r < rows; r += 16) {
      F16 factor = 1.0f / (1.0f + exponential(-widen(room.factors + r, rows - r)));
      narrow(room.factors + r, factor, rows - r);
    }
  }
  share_out(alone ? 1 : threads, rows, [&](int64_t r) {
    T *to = out + r * hidden, *from = room.shared + r * hidden;
    for (int64_t i = 0; i < hidden; i += 16) {
      F16 y = widen(from + i, hidden - i);
      if (m.gate.weights) y = times(y, room.factors[r]);
      narrow(to + i, widen(to + i, hidden - i) + y, hidden - i);
    }
  });
}

template <class T>
void run(const Mixture &m, const T *x, T *out, void *at, int64_t rows, int64_t threads) {
  Room<T> room(m, rows, at);
  int64_t hidden = m.facts->hidden, k = m.routing.per_token;
  bool alone = rows * hidden < 1 << 14;
  const float *wide = room.wide;
  if constexpr (std::is_same_v<T, float>)
    wide = x;
  else
    share_out(alone ? 1 : threads, rows, [&](int64_t r) { round_to(x + r * hidden, room.wide + r * hidden, hidden); });
  product(FLOAT32, wide, m.router, room.logits, rows, hidden, threads);
  route(&m.routing, room.logits, room.index, room.chances, rows, threads);
  round_to(room.chances, room.weight, rows * k);
  run_experts(m.facts, m.experts, x, room.index, room.weight, out, room.experts, rows, k, threads);
  if (m.up.weights) add_shared(m, room, x, out, rows, alone, threads);
}

} // namespace

// How much room `run_mixture` takes.
EXPORT int64_t mixture_bytes(const Mixture *m, int64_t rows) {
  return (int64_t)(m->facts->type == FLOAT32 ? Room<float>(*m, rows, nullptr).end : Room<bf16>(*m, rows, nullptr).end);
}

// x[T, M] through its mixture -> out[T, M].
EXPORT void run_mixture(const Mixture *m, const void *x, void *out, void *room, int64_t rows, int64_t threads) {
  if (m->facts->type == FLOAT32)
    run(*m, (const float *)x, (float *)out, room, rows, threads);
  else if (m->facts->type == BFLOAT16)
    run(*m, (const bf16 *)x, (bf16 *)out, room, rows, threads);
  else
    run(*m, (const fp16 *)x, (fp16 *)out, room, rows, threads);
}
