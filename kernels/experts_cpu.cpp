// A mixture's experts in a single call: rows sorted by expert, then each product of all experts at once, so that the weights of
// many experts with a row each stream through all cores as those of one matrix do.
#include "mixture.h"

#include <algorithm>
#include <vector>

extern "C" void gated(int64_t, const void *, void *, int64_t, int64_t, int64_t, double, int64_t);

namespace {

// Who computes what: the rows that each of the experts has, one expert after the other, in the batch's order.
struct Dealt {
  std::vector<int64_t> taken; // of a row's choices, t * k + j
  std::vector<int64_t> place; // of a choice among the taken; -1: its expert lives elsewhere
  std::vector<int64_t> from, own; // where an expert's begin, and the experts that have any, fewest rows first
};

Dealt deal(const int64_t *index, int64_t choices, const Experts &f) {
  Dealt d;
  d.from.assign(f.count + 1, 0);
  auto own = [&](int64_t i) { return index[i] >= f.first && index[i] < f.first + f.count; };
  for (int64_t i = 0; i < choices; i++)
    if (own(i)) d.from[index[i] - f.first + 1]++;
  for (int64_t e = 0; e < f.count; e++) {
    if (d.from[e + 1]) d.own.push_back(e);
    d.from[e + 1] += d.from[e];
  }
  auto rows = [&](int64_t e) { return d.from[e + 1] - d.from[e]; };
  std::stable_sort(d.own.begin(), d.own.end(), [&](int64_t a, int64_t b) { return rows(a) < rows(b); });
  std::vector<int64_t> next(d.from);
  d.taken.resize(d.from[f.count]), d.place.assign(choices, -1);
  for (int64_t i = 0; i < choices; i++)
    if (own(i)) d.taken[d.place[i] = next[index[i] - f.first]++] = i;
  return d;
}

template <class T>
void run(const Experts &f, const Expert *experts, const T *x, const int64_t *index, const T *weight, T *out, T *room, int64_t rows, int64_t k,
         int64_t threads) {
  Dealt d = deal(index, rows * k, f);
  int64_t n = (int64_t)d.taken.size(), m = f.hidden;
  T *given = room, *up = given + n * m, *gate = up + 2 * n * f.ffn, *found = given; // what has been read is written over
  share_out(n * m < 1 << 14 ? 1 : threads, n, [&](int64_t r) {
    const T *from = x + d.taken[r] / k * m;
    if (!f.on_input) return (void)std::memcpy((void *)(given + r * m), from, m * sizeof(T));
    for (int64_t i = 0; i < m; i += 16) narrow(given + r * m + i, times(widen(from + i, m - i), weight[d.taken[r]]), m - i);
  });
  std::vector<Part> ups, downs;
  for (int64_t e : d.own) {
    int64_t first = d.from[e], count = d.from[e + 1] - first;
    ups.push_back({given + first * m, m, experts[e].up, experts[e].up_bias, up + first * 2 * f.ffn, 2 * f.ffn, count});
    downs.push_back({gate + first * f.ffn, f.ffn, experts[e].down, experts[e].down_bias, found + first * m, m, count});
  }
  linear_parts(f.type, ups.data(), (int64_t)ups.size(), m, 2 * f.ffn, threads);
  gated(f.type, up, gate, n, f.ffn, f.gate, f.limit, threads);
  linear_parts(f.type, downs.data(), (int64_t)downs.size(), f.ffn, m, threads);
  share_out(n * m < 1 << 14 ? 1 : threads, rows, [&](int64_t t) {
    for (int64_t i = 0; i < m; i += 16) {
      F16 sum = splat(0.0f);
      for (int64_t j = t * k; j < (t + 1) * k; j++) {
        if (d.place[j] < 0) continue;
        F16 y = widen(found + d.place[j] * m + i, m - i);
        sum += f.on_input ? y : times(y, weight[j]);
      }
      narrow(out + t * m + i, sum, m - i);
    }
  });
}

} // namespace

// x[T, M] through the experts index[T, k], which weigh weight[T, k] -> out[T, M]. `room` has M + 3 F numbers for each of T * k.
EXPORT void run_experts(const Experts *f, const Expert *experts, const void *x, const int64_t *index, const void *weight, void *out,
                        void *room, int64_t rows, int64_t k, int64_t threads) {
  if (f->type == FLOAT32)
    run(*f, experts, (const float *)x, index, (const float *)weight, (float *)out, (float *)room, rows, k, threads);
  else if (f->type == BFLOAT16)
    run(*f, experts, (const bf16 *)x, index, (const bf16 *)weight, (bf16 *)out, (bf16 *)room, rows, k, threads);
  else
    run(*f, experts, (const fp16 *)x, index, (const fp16 *)weight, (fp16 *)out, (fp16 *)room, rows, k, threads);
}
