// Which groups hold how much of a prompt: see cluster/directory.py, whose rules these are, and cluster/prompt_keys.py. On its own,
// without torch. Calls of one directory come from one thread.
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

// Of block_ids.cpp
struct _object;
extern "C" void block_ids(const uint8_t *before, const uint8_t *tokens, int64_t count, int64_t bytes, uint8_t *ids);
extern "C" int64_t token_words(_object *list, int64_t first, int64_t stop, uint32_t *words);
extern "C" void tokens_ahead(_object *list, int64_t first, int64_t stop);

namespace {

constexpr int TIERS = 3, ID = 16, WAYS = 8;
constexpr int64_t PORTION = 64;
constexpr uint64_t SPREAD = 0x9e3779b97f4a7c15;

// key -> bits of groups, in slots of 1 + width words; a set of keys, where width is 0. Open addressing; key 0 is taken for 1.
struct Table {
  int width, log2 = 6;
  int64_t used = 0;
  std::vector<uint64_t> slots;

  explicit Table(int words = 1) : width(words), slots((1 + words) << log2) {}

  uint64_t *slot(int64_t place) { return slots.data() + place * (1 + width); }
  int64_t mask() const { return (int64_t(1) << log2) - 1; }
  int64_t home(uint64_t key) const { return int64_t(key * SPREAD >> (64 - log2)); }

  // Where the key is, or would be.
  uint64_t *find(uint64_t key) {
    int64_t place = home(key);
    while (*slot(place) && *slot(place) != key) place = (place + 1) & mask();
    return slot(place);
  }

  void reshape(int to_log2, int to_width) {
    Table next(to_width);
    next.log2 = to_log2, next.used = used;
    next.slots.assign((int64_t(1) << to_log2) * (1 + to_width), 0);
    for (int64_t place = 0; place <= mask(); place++)
      if (const uint64_t *from = slot(place); *from)
        std::memcpy(next.find(*from), from, 8 * (1 + (width < to_width ? width : to_width)));
    std::swap(*this, next);
  }

  // The key's slot, from now on if it wasn't there.
  uint64_t *claim(uint64_t key) {
    if (used * 3 > mask() * 2) reshape(log2 + 1, width);
    uint64_t *found = find(key);
    if (!*found) *found = key, used++;
    return found;
  }

  void release(uint64_t *found) {
    close((found - slots.data()) / (1 + width));
    used--;
  }

  void add(uint64_t key, int group) { claim(key)[1 + group / 64] |= uint64_t(1) << group % 64; }

  void drop(uint64_t key, int group) {
    uint64_t *found = find(key);
    found[1 + group / 64] &= ~(uint64_t(1) << group % 64);
    for (int word = 1; word <= width; word++)
      if (found[word]) return;
    release(found);
  }

  // The slot becomes free: what follows it moves up as far as it may.
  void close(int64_t free) {
    for (int64_t place = (free + 1) & mask(); *slot(place); place = (place + 1) & mask()) {
      const int64_t far = (place - home(*slot(place))) & mask();
      if (far < ((place - free) & mask())) continue;
      std::memcpy(slot(free), slot(place), 8 * (1 + width));
      free = place;
    }
    std::memset(slot(free), 0, 8 * (1 + width));
  }
};

// Portions of prompts that were seen, in sets of which each takes turns: what their ids depend on -> the ids.
struct Memory {
  struct Probe {
    uint64_t one, two;
  };
  struct Ids {
    uint8_t bytes[PORTION * ID];
  };
  std::vector<Probe> probes;
  std::vector<Ids> ids;
  std::vector<uint8_t> turns;

  // Where they are, or (false) where they belong.
  std::pair<Ids *, bool> find(Probe probe) {
    const size_t set = (probe.one ^ probe.one >> 32) % turns.size(), first = set * WAYS;
    for (size_t place = first; place < first + WAYS; place++)
      if (probes[place].one == probe.one && probes[place].two == probe.two) return {&ids[place], true};
    const size_t place = first + turns[set]++ % WAYS;
    probes[place] = probe;
    return {&ids[place], false};
  }
};

struct Directory {
  Table tiers[TIERS];
  std::vector<Table> held[TIERS]; // by group, so that nobody who looks for what one holds walks over what all do
  Memory memory;
  std::vector<uint64_t> keys; // of the hash of tokens
  uint8_t before[ID];
  Memory::Ids last; // of a block too long to be remembered

  int64_t most_words() const { return int64_t(keys.size()) - 3; }

  bool add(int tier, int group, uint64_t key) {
    Table &own = held[tier][group];
    const int64_t before = own.used;
    own.claim(key);
    if (own.used == before) return false;
    tiers[tier].add(key, group);
    return true;
  }

  bool drop(int tier, int group, uint64_t key) {
    Table &own = held[tier][group];
    uint64_t *found = own.find(key);
    if (!*found) return false;
    own.release(found);
    tiers[tier].drop(key, group);
    return true;
  }

  // There are tables for the group.
  void admit(int64_t group) {
    if (group >= 64 * tiers[0].width)
      for (Table &each : tiers) each.reshape(each.log2, int(group / 64 + 1));
    for (std::vector<Table> &each : held)
      if (group >= int64_t(each.size())) each.resize(group + 1, Table(0));
  }
};

uint64_t key_of(const uint8_t *id) {
  uint64_t key;
  std::memcpy(&key, id, 8);
  return key ? key : 1;
}

// Sums of products with secret keys (Lemire and Kaser 2014, arXiv:1202.4961): nobody finds tokens that are taken for others.
Memory::Probe probe_of(const std::vector<uint64_t> &keys, const uint8_t *before, const uint8_t *tokens, int64_t count,
                      int64_t bytes) {
  uint64_t id[2], one = keys[0] + count, two = keys[1] + bytes; // the same tokens may be blocks of another size
  std::memcpy(id, before, ID);
  const uint64_t *key = keys.data() + 2;
  for (int64_t at = 0; at < count * bytes; at += 4, key++) {
    uint32_t word;
    std::memcpy(&word, tokens + at, 4);
    one += key[0] * (word + uint64_t(1)), two += key[1] * (word + uint64_t(1));
  }
  return {id[0] ^ one, id[1] ^ two};
}

// The ids of a portion behind self.before, which moves to its end; found again if they were seen. Meanwhile the list's tokens
// from `next` on, as many, and what the tables say of a block, are on their way.
const uint8_t *ids_of(Directory &self, const uint8_t *tokens, int64_t count, int64_t bytes, _object *list, int64_t next, int64_t end) {
  std::pair<Memory::Ids *, bool> found = {&self.last, false};
  if (count * bytes <= 4 * self.most_words()) found = self.memory.find(probe_of(self.keys, self.before, tokens, count, bytes));
  uint8_t *ids = found.first->bytes;
  for (int64_t n = 0; n < count; n++, next += bytes / 4) {
    if (next + bytes / 4 <= end) tokens_ahead(list, next, next + bytes / 4);
    if (!found.second) block_ids(n ? ids + (n - 1) * ID : self.before, tokens + n * bytes, 1, bytes, ids + n * ID);
    for (Table &table : self.tiers)
      if (table.used) __builtin_prefetch(table.slot(table.home(key_of(ids + n * ID))));
  }
  std::memcpy(self.before, ids + (count - 1) * ID, ID);
  return ids;
}

// alive[tier][width]: who holds all before. False: nobody any more.
bool walk(Directory &self, const uint8_t *ids, int64_t count, int64_t first, uint64_t *alive, int64_t places, int64_t *found) {
  const int width = self.tiers[0].width;
  for (int64_t n = 0; n < count; n++) {
    const uint64_t *holds[TIERS];
    for (int tier = 0; tier < TIERS; tier++) holds[tier] = self.tiers[tier].find(key_of(ids + n * ID));
    uint64_t any = 0;
    for (int word = 0; word < width; word++) {
      uint64_t bits = 0;
      for (int tier = 0; tier < TIERS; tier++) {
        uint64_t &left = alive[tier * width + word];
        bits |= holds[tier][1 + word];
        for (uint64_t gone = left & ~bits; gone; gone &= gone - 1)
          found[tier * places + word * 64 + __builtin_ctzll(gone)] = first + n;
        left &= bits, any |= left;
      }
    }
    if (!any) return false;
  }
  return true;
}

} // namespace

// secrets: three more than a portion may have tokens; memory: portions that are remembered, in eights
EXPORT void *directory_new(const uint64_t *secrets, int64_t count, int64_t memory) {
  Directory *self = new Directory;
  self->keys.assign(secrets, secrets + count);
  self->memory.probes.resize(memory), self->memory.ids.resize(memory), self->memory.turns.resize(memory / WAYS);
  return self;
}

EXPORT void directory_free(Directory *self) { delete self; }

// What a group stored and evicted, room: how many more may be held -> the room that is left
EXPORT int64_t directory_change(Directory *self, int64_t tier, int64_t group, const uint64_t *stored, int64_t stored_count,
                                const uint64_t *evicted, int64_t evicted_count, int64_t room) {
  self->admit(group);
  for (int64_t n = 0; n < evicted_count; n++) room += self->drop(int(tier), int(group), evicted[n] ? evicted[n] : 1);
  for (int64_t n = 0; n < stored_count && room > 0; n++) room -= self->add(int(tier), int(group), stored[n] ? stored[n] : 1);
  return room;
}

// A group holds exactly these, room: how many more may be held -> the room that is left
EXPORT int64_t directory_replace(Directory *self, int64_t tier, int64_t group, const uint64_t *keys, int64_t count, int64_t room) {
  self->admit(group);
  Table &own = self->held[tier][group], wanted(0);
  int log2 = wanted.log2; // at once: keys in the order of a larger table's slots would crowd the beginning of one that grows
  while (count * 3 > (int64_t(2) << log2)) log2++;
  wanted.reshape(log2, 0);
  for (int64_t n = 0; n < count; n++) wanted.claim(keys[n] ? keys[n] : 1);
  std::vector<uint64_t> gone;
  for (int64_t place = 0; place <= own.mask(); place++)
    if (const uint64_t key = *own.slot(place); key && !*wanted.find(key)) gone.push_back(key);
  for (uint64_t key : gone) room += self->drop(int(tier), int(group), key);
  if (!own.used) own = Table(0); // it gives its memory back
  if (own.log2 < log2) own.reshape(log2, 0);
  for (int64_t n = 0; n < count && room > 0; n++) room -= self->add(int(tier), int(group), keys[n] ? keys[n] : 1);
  return room;
}

EXPORT int64_t directory_size(Directory *self, int64_t tier) { return self->tiers[tier].used; }

// found[tier][group]: how many of the first `count` blocks, of `size` tokens of the list each, the first one behind `start`, a group
// holds without a gap in tiers up to this one. Reads and hashes a portion only while somebody holds all before it. False: some token
// doesn't fit. The interpreter's lock is held.
EXPORT bool directory_prefixes(Directory *self, const uint8_t *start, _object *list, int64_t count, int64_t size, int64_t places,
                               int64_t *found) {
  const int width = self->tiers[0].width;
  const int64_t fit = self->most_words() / size, most = fit < 1 ? 1 : fit < PORTION ? fit : PORTION;
  std::vector<uint64_t> alive(TIERS * width);
  std::vector<uint32_t> words(most * size);
  for (int64_t group = 0; group < places && group < 64 * width; group++)
    for (int tier = 0; tier < TIERS; tier++) alive[tier * width + group / 64] |= uint64_t(1) << group % 64;
  std::memset(found, 0, 8 * TIERS * places);
  std::memcpy(self->before, start, ID);
  for (int64_t first = 0; first < count; first += most) {
    const int64_t portion = count - first < most ? count - first : most;
    const int64_t from = first * size, to = from + portion * size;
    if (token_words(list, from, to, words.data()) < to - from) return false;
    const uint8_t *ids = ids_of(*self, (const uint8_t *)words.data(), portion, 4 * size, list, to, count * size);
    if (!walk(*self, ids, portion, first, alive.data(), places, found)) return true;
  }
  for (int64_t group = 0; group < places && group < 64 * width; group++)
    for (int tier = 0; tier < TIERS; tier++)
      if (alive[tier * width + group / 64] >> group % 64 & 1) found[tier * places + group] = count;
  return true;
}
