// A board: one process posts messages, others of the machine read each of them, in order. All readers are woken at once.
#include "turns.h"

#include "native.h"

namespace {

constexpr uint32_t SLOTS = 16;
constexpr int64_t SLOT_BYTES = 65536 - 64; // board.py says the same

struct Slot {
  int64_t bytes;
  char rest[56], message[SLOT_BYTES];
};

} // namespace

struct Board {
  char name[64];
  Counter posted;
  Slot slots[SLOTS];
  Counter read[1]; // by each reader
};

EXPORT int64_t board_bytes(int64_t readers) { return sizeof(Board) + readers * sizeof(Counter); }

// 1: one of these readers hasn't read yet what lies where this message belongs. One that is too long is but announced.
EXPORT int64_t post(Board *b, const int64_t *readers, int64_t count, int64_t number, const char *message, int64_t bytes) {
  for (int64_t i = 0; i < count; i++)
    if (!reached(b->read[readers[i]], (uint32_t)number - SLOTS)) return 1;
  Slot &slot = b->slots[number % SLOTS];
  slot.bytes = bytes;
  if (bytes <= SLOT_BYTES) std::memcpy(slot.message, message, bytes);
  advance(b->posted, (uint32_t)number);
  return 0;
}

// Readers that sleep look up, though there is no message.
EXPORT void nudge(Board *b) {
  if (b->posted.sleepers.load()) wake(b->posted.turn);
}

// Bytes of this message, which is in `into` unless it is too long for that; -1: it isn't there within `nap_ns`.
EXPORT int64_t take(Board *b, int64_t reader, int64_t number, char *into, int64_t nap_ns) {
  Counter &posted = b->posted;
  if (!reached(posted, (uint32_t)number)) {
    posted.sleepers.fetch_add(1);
    uint32_t seen = posted.turn.load();
    if ((int32_t)(seen - (uint32_t)number) < 0) sleep_while(posted.turn, seen, nap_ns);
    posted.sleepers.fetch_sub(1);
    if (!reached(posted, (uint32_t)number)) return -1;
  }
  const Slot &slot = b->slots[number % SLOTS];
  int64_t bytes = slot.bytes;
  if (bytes <= SLOT_BYTES) std::memcpy(into, slot.message, bytes);
  b->read[reader].turn.store((uint32_t)number, std::memory_order_release);
  return bytes;
}
