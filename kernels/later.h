// What a thread reads next, called from memory while it works.
#pragma once
#include <cstdint>

// Rows that are called for meanwhile, evenly and one line after the other, as memory gives them fastest. Of no bytes: none are.
struct Later {
  const char *base;
  const int64_t *rows; // in numbers
  int64_t number, bytes; // of a number, of a row
  int64_t called, last, due, pace; // rows: so far, of the plan; 65536ths of rows: by now, in each step
  void call(int64_t row) const {
    for (int64_t at = 0; at < bytes; at += 128) { // there may be no rows
      const char *from = base + number * rows[row] + at;
      __builtin_prefetch(from), __builtin_prefetch(from + 64);
    }
  }
  // The next `count` rows are called for in so many steps.
  void plan(int64_t count, int64_t steps) {
    last = called + count, due = called << 16, pace = ((count << 16) + steps - 1) / steps;
  }
  void step() {
    due += pace;
    for (; called < last && called < due >> 16; called++) call(called);
  }
};
