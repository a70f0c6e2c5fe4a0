// Which groups hold how much of a prompt: see cluster/directory.py, whose rules these are, and cluster/prompt_keys.py. On its own,
// without torch. Calls of one directory come from one thread.
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
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
constexpr int64_t PORTION = 64, EMPTY_SLOTS = 32;
constexpr uint64_t SPREAD = 0x9e3779b97f4a7c15;

// key -> bits of groups, in slots of 1 + width words; a set of keys, where width is 0. Open addressing; key 0 is taken for 1.
struct Table {
  int width, log2 = 3, share = 512; // share: of 1024 slots, so many may be used
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
    next.log2 = to_log2, next.used = used, next.share = share;
    next.slots.assign((int64_t(1) << to_log2) * (1 + to_width), 0);
    for (int64_t place = 0; place <= mask(); place++)
      if (const uint64_t *from = slot(place); *from)
        std::memcpy(next.find(*from), from, 8 * (1 + (width < to_width ? width : to_width)));
    std::swap(*this, next);
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

// Keys dealt out to tables that grow each at its own time, so that nobody waits for more than one of them. None, at first.
struct Parts {
  std::vector<Table> tables;
  int64_t used = 0;

  Parts() = default;
  Parts(int count, int width) : tables(count, Table(width)) {
    for (int n = 0; n < count; n++) tables[n].share = 460 + 222 * n / count;
  }

  Table &of(uint64_t key) { return tables[key * SPREAD >> 20 & (tables.size() - 1)]; }

  // The key's slot, with room for `width` words, from now on if it wasn't there; work: plus the keys that were moved for it.
  uint64_t *claim(uint64_t key, int width, int64_t *work) {
    Table &table = of(key);
    const bool full = table.used * 1024 >= int64_t(table.share) << table.log2;
    if (full || table.width < width) {
      *work += table.used;
      table.reshape(table.log2 + full, table.width < width ? width : table.width);
    }
    uint64_t *found = table.find(key);
    if (!*found) *found = key, table.used++, used++;
    return found;
  }

  bool has(uint64_t key) { return used && *of(key).find(key); }

  // False: it wasn't there.
  bool release(uint64_t key) {
    if (!used) return false;
    Table &table = of(key);
    uint64_t *found = table.find(key);
    if (!*found) return false;
    table.close((found - table.slots.data()) / (1 + table.width));
    table.used--, used--;
    return true;
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
  std::unique_ptr<Ids[]> ids; // 8 MB that are touched as they are needed
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

// What a group holds in a tier. What is leaving has its bits still, and goes little by little.
struct Held {
  Parts own{16, 0};
  std::deque<Parts> leaving; // each key in one of them
  size_t part = 0;           // of the first of them: all before are empty, and the slots of this one up to `place`
  int64_t place = 0;

  int64_t left() const {
    int64_t count = 0;
    for (const Parts &each : leaving) count += each.used;
    return count;
  }

  bool stays(uint64_t key) {
    for (Parts &each : leaving)
      if (each.release(key)) return true;
    return false;
  }
};

struct Directory {
  Parts tiers[TIERS] = {{256, 1}, {256, 1}, {256, 1}};
  std::vector<Held> held[TIERS]; // by group, so that nobody who looks for what one holds walks over what all do
  Memory memory;
  std::vector<uint64_t> keys; // of the hash of tokens
  uint8_t before[ID];
  Memory::Ids last; // of a block too long to be remembered

  int64_t most_words() const { return int64_t(keys.size()) - 3; }

  Held &of(int64_t tier, int64_t group) {
    for (std::vector<Held> &each : held)
      if (group >= int64_t(each.size())) each.resize(group + 1);
    return held[tier][group];
  }

  // The group's bit, which is set.
  void drop(int64_t tier, int64_t group, uint64_t key) {
    Table &table = tiers[tier].of(key);
    uint64_t *found = table.find(key);
    found[1 + group / 64] &= ~(uint64_t(1) << group % 64);
    for (int word = 1; word <= table.width; word++)
      if (found[word]) return;
    tiers[tier].release(key);
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
    for (Parts &tier : self.tiers)
      if (tier.used) {
        Table &table = tier.of(key_of(ids + n * ID));
        __builtin_prefetch(table.slot(table.home(key_of(ids + n * ID))));
      }
  }
  std::memcpy(self.before, ids + (count - 1) * ID, ID);
  return ids;
}

// alive[tier][width]: who holds all before. False: nobody any more.
bool walk(Directory &self, const uint8_t *ids, int64_t count, int64_t first, uint64_t *alive, int width, int64_t places,
          int64_t *found) {
  for (int64_t n = 0; n < count; n++) {
    const uint64_t key = key_of(ids + n * ID), *holds[TIERS];
    int words[TIERS] = {};
    for (int tier = 0; tier < TIERS; tier++) {
      if (!self.tiers[tier].used) continue; // many small tables that are empty aren't in the processor's cache
      Table &table = self.tiers[tier].of(key);
      holds[tier] = table.find(key), words[tier] = table.width;
    }
    uint64_t any = 0;
    for (int word = 0; word < width; word++) {
      uint64_t bits = 0;
      for (int tier = 0; tier < TIERS; tier++) {
        uint64_t &left = alive[tier * width + word];
        if (word < words[tier]) bits |= holds[tier][1 + word];
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
  self->memory.probes.resize(memory), self->memory.ids.reset(new Memory::Ids[memory]), self->memory.turns.resize(memory / WAYS);
  return self;
}

EXPORT void directory_free(Directory *self) { delete self; }

// What a group stored: of `count` keys those for which there is room, and (pass) over those for which there isn't. It stops at
// the first without room, else when the work has come to `most` keys -> how many it is done with. came: {keys that take room,
// and that found none}
EXPORT int64_t directory_store(Directory *self, int64_t tier, int64_t group, const uint64_t *keys, int64_t count, int64_t room,
                               bool pass, int64_t most, int64_t *came) {
  Held &held = self->of(tier, group);
  int64_t work = 0, n = 0;
  came[0] = came[1] = 0;
  for (; n < count && n + work < most; n++) {
    const uint64_t key = keys[n] ? keys[n] : 1;
    if (held.stays(key)) {
      held.own.claim(key, 0, &work);
      continue;
    }
    if (room <= came[0]) {
      if (held.own.has(key)) continue;
      if (!pass) break;
      came[1]++;
      continue;
    }
    const int64_t before = held.own.used;
    held.own.claim(key, 0, &work);
    if (held.own.used == before) continue;
    self->tiers[tier].claim(key, int(group / 64 + 1), &work)[1 + group / 64] |= uint64_t(1) << group % 64;
    came[0]++;
  }
  return n;
}

// What went from a group -> how many of them it held
EXPORT int64_t directory_evict(Directory *self, int64_t tier, int64_t group, const uint64_t *keys, int64_t count) {
  Held &held = self->of(tier, group);
  int64_t gone = 0;
  for (int64_t n = 0; n < count; n++) {
    const uint64_t key = keys[n] ? keys[n] : 1;
    if (!held.own.release(key)) continue;
    self->drop(tier, group, key);
    gone++;
  }
  return gone;
}

// All that a group holds is leaving: it stays only where it is stored again before `directory_sweep` comes to it.
EXPORT void directory_condemn(Directory *self, int64_t tier, int64_t group) {
  Held &held = self->of(tier, group);
  if (!held.own.used) return;
  held.leaving.push_back(std::move(held.own));
  held.own = Parts(16, 0);
}

// Up to `most` of what is leaving goes -> how many
EXPORT int64_t directory_sweep(Directory *self, int64_t tier, int64_t group, int64_t most) {
  Held &held = self->of(tier, group);
  int64_t gone = 0;
  for (int64_t looks = 0;; looks++) {
    for (; !held.leaving.empty() && !held.leaving.front().used; held.part = 0, held.place = 0)
      held.leaving.pop_front(); // it gives its memory back
    if (held.leaving.empty() || gone == most || looks == EMPTY_SLOTS * most) return gone;
    Parts &leaving = held.leaving.front();
    Table &table = leaving.tables[held.part];
    if (const uint64_t key = *table.slot(held.place)) { // what follows moves up, and is never behind us
      leaving.release(key);
      self->drop(tier, group, key);
      gone++;
    } else if (++held.place > table.mask()) {
      held.part++, held.place = 0;
    }
  }
}

// Blocks that a group holds, or that are leaving
EXPORT int64_t directory_held(Directory *self, int64_t tier, int64_t group) { return self->of(tier, group).own.used; }
EXPORT int64_t directory_leaving(Directory *self, int64_t tier, int64_t group) { return self->of(tier, group).left(); }

EXPORT int64_t directory_size(Directory *self, int64_t tier) { return self->tiers[tier].used; }

// found[tier][group]: how many of the first `count` blocks, of `size` tokens of the list each, the first one behind `start`, a group
// holds without a gap in tiers up to this one. Reads and hashes a portion only while somebody holds all before it. False: some token
// doesn't fit. The interpreter's lock is held.
EXPORT bool directory_prefixes(Directory *self, const uint8_t *start, _object *list, int64_t count, int64_t size, int64_t places,
                               int64_t *found) {
  const int width = int((places + 63) / 64);
  const int64_t fit = self->most_words() / size, most = fit < 1 ? 1 : fit < PORTION ? fit : PORTION;
  std::vector<uint64_t> alive(TIERS * width);
  std::vector<uint32_t> words(most * size);
  for (int64_t group = 0; group < places; group++)
    for (int tier = 0; tier < TIERS; tier++) alive[tier * width + group / 64] |= uint64_t(1) << group % 64;
  std::memset(found, 0, 8 * TIERS * places);
  std::memcpy(self->before, start, ID);
  for (int64_t first = 0; first < count; first += most) {
    const int64_t portion = count - first < most ? count - first : most;
    const int64_t from = first * size, to = from + portion * size;
    if (token_words(list, from, to, words.data()) < to - from) return false;
    const uint8_t *ids = ids_of(*self, (const uint8_t *)words.data(), portion, 4 * size, list, to, count * size);
    if (!walk(*self, ids, portion, first, alive.data(), width, places, found)) return true;
  }
  for (int64_t group = 0; group < places; group++)
    for (int tier = 0; tier < TIERS; tier++)
      if (alive[tier * width + group / 64] >> group % 64 & 1) found[tier * places + group] = count;
  return true;
}
