// Layers one after the other in a single call: with few rows the time between calls would be longer than the calls.
#include "mixture.h"
#include "node_sums.h"

extern "C" {
void rms_norm(int64_t, const void *, int64_t, int64_t, int64_t, const void *, double, const void *, double, double, void *, void *,
              int64_t, int64_t, int64_t);
void gated(int64_t, const void *, void *, int64_t, int64_t, int64_t, double, int64_t);
void turn_and_write(int64_t, void *, int64_t, const void *, int64_t, const void *, int64_t, const void *, const void *,
                    const Cache *, const int64_t *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
void attention(int64_t, const void *, int64_t, int64_t, const Cache *, const int32_t *, int64_t, const int32_t *,
               const int32_t *, int64_t, int64_t, int64_t, int64_t, int64_t, double, double, int64_t, int64_t, int64_t,
               const float *, const float *, void *, int64_t);
}

namespace {

// One layer's facts; stack.py lays them out alike.
struct Layer {
  const void *attn_norm, *mlp_norm, *q_norm, *k_norm;
  Product qkv, o, up, down;
  const Mixture *mixture; // in place of `up` and `down`, or null
  Cache cache;
  const float *sinks, *slopes;
  int64_t window, chunk, rope, interleaved, group;
};

struct Shape {
  int64_t hidden, ffn, heads, kv_heads, dim, gate, causal;
  double eps, offset, residual, scale, softcap, limit;
};

struct Angles {
  const void *cos, *sin;
  int64_t turned;
};

struct Group {
  const int32_t *table;
  int64_t table_row;
  const int64_t *slots;
};

struct Step {
  int64_t rows, sequences;
  const int32_t *starts, *lengths;
  const Angles *angles;
  const Group *groups;
};

thread_local Scratch scratch, room;

// Numbers of the layers' type T, whose number is `type`.
template <class T>
int64_t run(int64_t type, const Layer *layers, int64_t count, const Shape &s, const Step &step, T *x, T *y, int64_t fresh,
            Meeting *meeting, int64_t threads) {
  int64_t t = step.rows, q_width = s.heads * s.dim, k_width = s.kv_heads * s.dim, row = q_width + 2 * k_width;
  T *h = (T *)scratch.get(sizeof(T) * (size_t)t * (s.hidden + row + 2 * q_width + k_width + 3 * s.ffn));
  T *qkv = h + t * s.hidden, *found = qkv + t * row, *q_normed = found + t * q_width, *k_normed = q_normed + t * q_width;
  T *up = k_normed + t * k_width, *gate = up + 2 * t * s.ffn;
  for (const Layer *l = layers; l < layers + count; l++, fresh = 0) {
    const Group &group = step.groups[l->group];
    const Angles &angles = step.angles[l->rope];
    rms_norm(type, x, s.hidden, 1, 0, fresh ? nullptr : y, s.residual, l->attn_norm, s.offset, s.eps, x, h, t, s.hidden, threads);
    product(type, h, l->qkv, qkv, t, s.hidden, threads);
    T *q = qkv, *k = qkv + q_width;
    int64_t q_row = row, k_row = row;
    if (l->q_norm) {
      rms_norm(type, q, row, s.heads, s.dim, nullptr, 1, l->q_norm, s.offset, s.eps, nullptr, q_normed, t * s.heads, s.dim, threads);
      rms_norm(type, k, row, s.kv_heads, s.dim, nullptr, 1, l->k_norm, s.offset, s.eps, nullptr, k_normed, t * s.kv_heads, s.dim,
               threads);
      q = q_normed, k = k_normed, q_row = q_width, k_row = k_width;
    }
    turn_and_write(type, q, q_row, k, k_row, qkv + q_width + k_width, row, angles.cos, angles.sin, &l->cache,
                   group.slots, t, s.heads, s.kv_heads, s.dim, angles.turned, l->interleaved, threads);
    attention(type, q, q_row, s.dim, &l->cache, group.table, group.table_row, step.starts, step.lengths, step.sequences,
              s.heads, s.kv_heads, s.dim, s.dim, s.scale, s.softcap, l->window, l->chunk, s.causal, l->sinks, l->slopes, found,
              threads);
    product(type, found, l->o, y, t, q_width, threads);
    if (int64_t failed = meeting ? sum_between(meeting, type, y, y, t * s.hidden) : 0) return failed;
    rms_norm(type, x, s.hidden, 1, 0, y, s.residual, l->mlp_norm, s.offset, s.eps, x, h, t, s.hidden, threads);
    if (l->mixture) {
      run_mixture(l->mixture, h, y, room.get(mixture_bytes(l->mixture, t)), t, threads);
    } else {
      product(type, h, l->up, up, t, s.hidden, threads);
      gated(type, up, gate, t, s.ffn, s.gate, s.limit, threads);
      product(type, gate, l->down, y, t, s.ffn, threads);
    }
    if (int64_t failed = meeting ? sum_between(meeting, type, y, y, t * s.hidden) : 0) return failed;
  }
  return 0;
}

} // namespace

// x[T, M] and, unless `fresh`, y[T, M] to be added to it -> the same behind `count` layers. With a `meeting` the layers are a
// rank's part, and its y are summed over all ranks; how an exchange failed is returned.
EXPORT int64_t run_layers(int64_t type, const Layer *layers, int64_t count, const Shape *shape, const Step *step, void *x, void *y,
                          int64_t fresh, Meeting *meeting, int64_t threads) {
  if (type == FLOAT32) return run(type, layers, count, *shape, *step, (float *)x, (float *)y, fresh, meeting, threads);
  if (type == BFLOAT16) return run(type, layers, count, *shape, *step, (bf16 *)x, (bf16 *)y, fresh, meeting, threads);
  return run(type, layers, count, *shape, *step, (fp16 *)x, (fp16 *)y, fresh, meeting, threads);
}
