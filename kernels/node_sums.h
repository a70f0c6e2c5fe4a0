// Exchanges between processes of one machine through memory that all of them map: a rank writes its part, says so, and reads
// what the others wrote.
#pragma once
#include "native.h"
#include "turns.h"

struct Shared { // in front of the parts: [2][size] of `capacity` bytes
  char name[64];
  std::atomic<uint32_t> aborted;
  char rest[60];
  Counter counters[1]; // the newest turn for which a rank has written its part
};

// A process's end; node_sums.py lays it out alike.
struct Meeting {
  Shared *shared;
  char *parts;
  int64_t own, size, capacity;
  int64_t turn; // 32 bits of it are compared
  int64_t spin_ns, timeout_ns;
};

enum Met { MET, TIMED_OUT, ABORTED };

// out = the sum of every rank's x, added in float32 in the order of the ranks. out may be x.
extern "C" int64_t sum_between(Meeting *meeting, int64_t type, const void *x, void *out, int64_t numbers);
