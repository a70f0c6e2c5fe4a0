// A mixture of experts as its parts take it; moe_native.py, packed_experts.py and packed_mixture.py lay them out alike.
#pragma once
#include "linear_parts.h"

enum Scoring { SOFTMAX, SIGMOID, SPARSEMIXER };

// How a router's logits choose `per_token` of `count` experts.
struct Routing {
  int64_t count, per_token, scoring, renormalise, groups, groups_used, best_two;
  double scale, jitter;
  const float *bias; // decides who is chosen, but not how much it counts; may be null
};

struct Expert {
  const void *up, *up_bias, *down, *down_bias;
};

// What all experts have in common; they are those from `first` on.
struct Experts {
  int64_t type, hidden, ffn, gate, first, count, on_input;
  double limit;
};

struct Mixture {
  Routing routing;
  Product router; // float32
  const Experts *facts;
  const Expert *experts;
  Product up, down, gate; // the MLP that all rows share, and by how much its result counts; may be none
};

// Rounded, as the definition's product is.
template <class T>
static inline F16 times(F16 x, T factor) {
  T part[16];
  narrow(part, x * scalar(factor));
  return widen(part);
}

extern "C" {
void route(const Routing *routing, const float *logits, int64_t *index, float *weight, int64_t rows, int64_t threads);
void run_experts(const Experts *facts, const Expert *experts, const void *x, const int64_t *index, const void *weight, void *out,
                 void *room, int64_t rows, int64_t k, int64_t threads);
int64_t mixture_bytes(const Mixture *mixture, int64_t rows);
void run_mixture(const Mixture *mixture, const void *x, void *out, void *room, int64_t rows, int64_t threads);
}
