// Who computes which row of a mixture. In double precision, as the definition (moe.py): how either rounds decides nothing.
#include "mixture.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace {

bool better(double a, double b) { return a > b || (a != a && b == b); } // a NaN before any number, as torch sorts

struct Router {
  const Routing &f;
  std::vector<double> scores, choice, of_groups;
  std::vector<int64_t> order;

  // `order` begins with the places of the best `wanted` of x[count], the first of equals first.
  void rank(const double *x, int64_t count, int64_t wanted) {
    order.resize(count);
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + wanted, order.end(),
                      [&](int64_t a, int64_t b) { return better(x[a], x[b]) || (!better(x[b], x[a]) && a < b); });
  }

  void score() {
    if (f.scoring == SIGMOID) {
      for (double &x : scores) x = 1 / (1 + std::exp(-x));
      return;
    }
    double most = *std::max_element(scores.begin(), scores.end(), [](double a, double b) { return better(b, a); }), sum = 0;
    for (double &x : scores) sum += x = std::exp(x - most);
    for (double &x : scores) x /= sum;
  }

  void keep_best_groups() {
    int64_t size = f.count / f.groups;
    of_groups.resize(f.groups);
    for (int64_t g = 0; g < f.groups; g++) {
      const double *own = &choice[g * size];
      rank(own, size, 1 + f.best_two);
      of_groups[g] = own[order[0]] + (f.best_two ? own[order[1]] : 0);
    }
    rank(of_groups.data(), f.groups, f.groups_used);
    for (int64_t i = f.groups_used; i < f.groups; i++) std::fill_n(&choice[order[i] * size], size, 0.0);
  }

  // Each among those that come close to it; it is left out of what comes after.
  void sparsemixer(int64_t *index, float *weight) {
    for (int64_t j = 0; j < f.per_token; j++) {
      rank(scores.data(), f.count, 1);
      double best = scores[order[0]], sum = 0;
      for (double x : scores)
        if (!((best - x) / std::max(std::fabs(x), best) > 2 * f.jitter)) sum += std::exp(x - best);
      index[j] = order[0], weight[j] = (float)(1 / sum), scores[order[0]] = -INFINITY;
    }
  }

  void row(const float *logits, int64_t *index, float *weight) {
    scores.assign(logits, logits + f.count);
    if (f.scoring == SPARSEMIXER) return sparsemixer(index, weight);
    score();
    choice = scores;
    for (int64_t e = 0; f.bias && e < f.count; e++) choice[e] += f.bias[e];
    if (f.groups > 1) keep_best_groups();
    rank(choice.data(), f.count, f.per_token);
    double sum = 1e-20;
    for (int64_t j = 0; j < f.per_token; j++) index[j] = order[j], sum += scores[order[j]];
    for (int64_t j = 0; j < f.per_token; j++) weight[j] = (float)(scores[order[j]] / (f.renormalise ? sum : 1) * f.scale);
  }
};

} // namespace

// logits[T, E] -> the chosen experts' index[T, k] and weight[T, k].
EXPORT void route(const Routing *f, const float *logits, int64_t *index, float *weight, int64_t rows, int64_t threads) {
  share_runs(rows * f->count < 1 << 11 ? 1 : threads, rows, [&] {
    return [&, router = Router{*f}](int64_t r) mutable {
      router.row(logits + r * f->count, index + r * f->per_token, weight + r * f->per_token);
    };
  });
}
