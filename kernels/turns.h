// How processes of one machine wait for each other in memory that all of them map: a counter, and a sleep until it moves
// (Linux: futex; elsewhere a moment's yield).
#pragma once
#include <atomic>
#include <cstdint>
#include <ctime>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

struct Counter { // on a cache line of its own
  std::atomic<uint32_t> turn, sleepers;
  char rest[56];
};

static inline bool reached(const Counter &c, uint32_t turn) {
  return (int32_t)(c.turn.load(std::memory_order_acquire) - turn) >= 0;
}

static inline void sleep_while(std::atomic<uint32_t> &word, uint32_t value, int64_t nap_ns) {
#ifdef __linux__
  timespec nap{nap_ns / 1'000'000'000, nap_ns % 1'000'000'000};
  syscall(SYS_futex, (uint32_t *)&word, FUTEX_WAIT, value, &nap, nullptr, 0);
#else
  sched_yield();
#endif
}

static inline void wake(std::atomic<uint32_t> &word) {
#ifdef __linux__
  syscall(SYS_futex, (uint32_t *)&word, FUTEX_WAKE, 1 << 30, nullptr, nullptr, 0);
#endif
}

// It has reached `turn`: whoever sleeps until then wakes.
static inline void advance(Counter &c, uint32_t turn) {
  c.turn.store(turn); // in one order with the sleepers' count
  if (c.sleepers.load()) wake(c.turn);
}
