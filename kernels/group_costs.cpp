// What a request would cost at each group: the rules of cluster/choices.py and cluster/fetch.py, which are their definition, in one
// call for all groups.
#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Rows of cluster/standings.py
enum { DECODING, PREFILL_TOKENS, PREFILLS, REQUESTS, RATE, FETCH_FLOOR, FETCH_TOKEN, SERVES };
constexpr int TIERS = 3, LENDERS = 4; // MAX_PEERS of cluster/fetch.py, and the group that asks

static double at_least(double least, double value) { return value > least ? value : least; }

// table[field][stride] by group's number; found[tier][places]: tokens that a group holds, of `length`; saved[tier]: what one of them
// that isn't in the tier before saves there; mean: what groups compute in a second; others: weight of their tokens before its own.
// The group of number `source`, if any, lends source_tokens whatever it told.
// numbers[count] -> out: cached, held, rest, fetched, cost, [count] each, then tokens that are lent[places], the LENDERS groups that
// lend most, of equals the least loaded first; the most that one has cached, and the home: the place of the cheapest of those that
// have `like` of that, or -1 where it is less than `affinity` of the least that there is to do.
EXPORT void group_costs(const double *table, int64_t stride, const int64_t *found, int64_t places, const int64_t *numbers,
                        int64_t count, double length, const double *saved, double mean, double others, double affinity,
                        double like, int64_t source, int64_t source_tokens, double *out) {
  double *cached = out, *held = cached + count, *rest = held + count, *fetched = rest + count, *cost = fetched + count;
  double *lent = cost + count, *lenders = lent + places, *best = lenders + LENDERS, *home = best + 1, most = 0, least = length;
  const double *requests = table + REQUESTS * stride;
  int64_t first[LENDERS], known = 0;
  for (int64_t group = 0; group < places; group++) {
    const int64_t own = group == source ? source_tokens : found[(TIERS - 1) * places + group];
    lent[group] = table[SERVES * stride + group] > 0 ? own : 0;
    if (lent[group] > most) most = lent[group];
    int64_t place = known;
    for (; place; place--) {
      const int64_t other = first[place - 1];
      if (lent[group] < lent[other] || (lent[group] == lent[other] && requests[group] >= requests[other])) break;
      if (place < LENDERS) first[place] = other;
    }
    if (place < LENDERS) first[place] = group;
    if (known < LENDERS) known++;
  }
  for (int64_t n = 0; n < known; n++) lenders[n] = first[n];
  *best = 0, *home = -1;
  for (int64_t n = 0; n < count; n++) {
    const double *standing = table + numbers[n];
    const int64_t *own = found + numbers[n];
    cached[n] = own[0], held[n] = own[(TIERS - 1) * places], rest[n] = length;
    for (int tier = 0; tier < TIERS; tier++) rest[n] -= saved[tier] * (own[tier * places] - (tier ? own[(tier - 1) * places] : 0));
    const double lacking = at_least(0, most - held[n]);
    const double gain = at_least(0, lacking - standing[FETCH_FLOOR * stride] - standing[FETCH_TOKEN * stride] * lacking);
    rest[n] -= gain, fetched[n] = gain > 0 ? lacking : 0;
    const double each = standing[PREFILLS * stride] * rest[n], all = standing[PREFILL_TOKENS * stride];
    const double rate = standing[RATE * stride] ? standing[RATE * stride] : mean;
    cost[n] = (standing[DECODING * stride] + others * (each < all ? each : all) + rest[n]) * (mean / rate);
    if (cached[n] > *best) *best = cached[n];
    if (rest[n] < least) least = rest[n];
  }
  if (!*best || *best < affinity * (*best + least)) return;
  for (int64_t n = 0; n < count; n++)
    if (cached[n] >= like * *best && (*home < 0 || cost[n] < cost[int64_t(*home)])) *home = n;
}
