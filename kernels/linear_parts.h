// Products that share threads: each has rows and weights of its own.
#pragma once
#include "native.h"

// x[rows, I], rows x_row numbers apart, times weights in the order of linear_cpu.cpp, plus bias[O] unless null -> out[rows, O],
// out_row apart.
struct Part {
  const void *x;
  int64_t x_row;
  const void *weights, *bias;
  void *out;
  int64_t out_row, rows;
};

// All parts, of `inputs` and `outputs` each. Best sorted by their rows, most of them last: the end is shared out in small pieces.
extern "C" void linear_parts(int64_t type, const Part *parts, int64_t count, int64_t inputs, int64_t outputs, int64_t threads);

// x[rows, I], rows x_row numbers apart, times weights in that order, plus bias[O] unless null -> out[rows, O].
extern "C" void linear(int64_t type, const void *x, int64_t x_row, const void *weights, const void *bias, void *out, int64_t rows,
                       int64_t inputs, int64_t outputs, int64_t threads);

// A matrix in that order and its bias, which may be null; without weights there is none.
struct Product {
  const void *weights, *bias;
  int64_t outputs;
};

static inline void product(int64_t type, const void *x, const Product &p, void *out, int64_t rows, int64_t inputs, int64_t threads) {
  linear(type, x, inputs, p.weights, p.bias, out, rows, inputs, p.outputs, threads);
}
