// Every kernel once over numbers of its own making; the results are printed, to be compared between instruction sets.
#include "../../kernels/native.h"

#include <cstdio>
#include <vector>

extern "C" {
void rms_norm(int64_t, const void *, int64_t, int64_t, int64_t, const void *, double, const void *, double, double, void *, void *,
              int64_t, int64_t, int64_t);
void pack_linear(int64_t, const void *, void *, int64_t, int64_t, int64_t);
void linear(int64_t, const void *, int64_t, const void *, const void *, void *, int64_t, int64_t, int64_t, int64_t);
int64_t multiplies_pairs();
void gated(int64_t, const void *, void *, int64_t, int64_t, int64_t, double, int64_t);
void turn_and_write(int64_t, void *, int64_t, const void *, int64_t, const void *, int64_t, const void *, const void *,
                    const Cache *, const int64_t *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
void attention(int64_t, const void *, int64_t, int64_t, const Cache *, const int32_t *, int64_t, const int32_t *,
               const int32_t *, int64_t, int64_t, int64_t, int64_t, int64_t, double, double, int64_t, int64_t, int64_t,
               const float *, const float *, void *, int64_t);
}

static uint32_t state = 1;

static float number() { // in [-1, 1)
  state = state * 1664525u + 1013904223u;
  return (float)(int32_t)state * 0x1p-31f;
}

template <class T>
static std::vector<T> some(size_t count) {
  std::vector<T> found(count + 16);
  for (size_t i = 0; i + 16 <= count + 15; i += 16) {
    float x[16];
    for (float &each : x) each = number();
    narrow(&found[i], load<F16>(x), (int64_t)(count - i));
  }
  return found;
}

template <class T>
static void show(const char *name, const std::vector<T> &x, size_t count) {
  for (size_t i = 0; i < count; i++) std::printf("%s %.9g\n", name, scalar(x[i]));
}

template <class T>
static void run(int64_t type, const char *name) {
  constexpr int64_t OUT = 70, IN = 96, ROWS = 7, HEADS = 4, KEYS = 2, DIM = 32, SIZE = 16, BLOCKS = 6;
  auto weights = some<T>(OUT * IN), bias = some<T>(OUT), x = some<T>(ROWS * IN);
  std::vector<T> packed(128 * IN), out(ROWS * OUT + 16), other(ROWS * OUT + 16);
  pack_linear(type, weights.data(), packed.data(), OUT, IN, 1);
  linear(type, x.data(), IN, packed.data(), bias.data(), out.data(), ROWS, IN, OUT, 1);
  show(name, out, ROWS * OUT);
  rms_norm(type, x.data(), IN, 1, 0, nullptr, 1.0, weights.data(), 0.0, 1e-5, other.data(), out.data(), 5, 70, 1);
  show(name, out, 5 * 70);
  for (int64_t kind : {0, 1, 2}) {
    gated(type, x.data(), out.data(), 3, 48, kind, 0.5, 1);
    show(name, out, 3 * 48);
  }

  for (int64_t kind : {type, (int64_t)INT8, (int64_t)E4M3, (int64_t)E5M2}) {
    int64_t each = kind == type ? sizeof(T) : 1, head = SIZE * DIM;
    std::vector<char> k(BLOCKS * KEYS * head * each), v(k.size());
    std::vector<float> k_scales(BLOCKS * KEYS * SIZE), v_scales(k_scales.size());
    Cache cache{kind, k.data(), v.data(), k_scales.data(), v_scales.data(), KEYS * head, DIM, head, KEYS * SIZE, 1, SIZE, SIZE};
    std::vector<int64_t> slots;
    for (int64_t s = 0; s < 80; s++) slots.push_back((5 - s / SIZE) * SIZE + s % SIZE);
    auto q = some<T>(80 * HEADS * DIM), keys = some<T>(80 * KEYS * DIM), values = some<T>(80 * KEYS * DIM);
    auto cos = some<T>(80 * DIM), sin = some<T>(80 * DIM);
    turn_and_write(type, q.data(), HEADS * DIM, keys.data(), KEYS * DIM, values.data(), KEYS * DIM, cos.data(), sin.data(),
                   &cache, slots.data(), 80, HEADS, KEYS, DIM, DIM, 0, 1);
    int32_t table[] = {5, 4, 3, 2, 1}, starts[] = {0, 80}, lengths[] = {80};
    std::vector<T> found(80 * HEADS * DIM + 16);
    attention(type, q.data(), HEADS * DIM, DIM, &cache, table, 5, starts, lengths, 1, HEADS, KEYS, DIM, DIM, 0.3, 0.0, 50, 0, 1,
              nullptr, nullptr, found.data(), 1);
    show(name, found, 80 * HEADS * DIM);
  }
}

int main() {
  run<float>(FLOAT32, "float32");
  run<bf16>(BFLOAT16, "bfloat16");
  run<fp16>(FLOAT16, "float16");
}
