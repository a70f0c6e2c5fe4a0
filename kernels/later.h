// What a thread reads next, called from memory while it works.
#pragma once
#include <cstdint>

// Rows that are called for meanwhile, evenly and one line after the other, as memory gives them fastest. Of no bytes: none are.
struct Later {
  const char *base;
  const int64_t *rows; // in numbers
  int64_t number, bytes; // of a number, of a row
  int64_t called;        // rows so far, by call_up_to
  void call(int64_t row) const {
    const char *from = base + number * rows[row];
    for (int64_t at = 0; at < bytes; at += 128) __builtin_prefetch(from + at), __builtin_prefetch(from + at + 64);
  }
  void call_up_to(int64_t row) {
    for (; called < row; called++) call(called);
  }
};
