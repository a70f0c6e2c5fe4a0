// What ranks of one node do in the memory that they share, by threads: sums of every size and type, dealt sums, gathered rows
// and columns; messages on a board to readers that are slower than who posts; an exchange that is given up.
// Built under sanitizers. The exit code is 0 when everything was right.
#include "../../kernels/node_sums.h"

#include <cstdio>
#include <thread>
#include <vector>

struct Board;
extern "C" {
int64_t scatter_between(Meeting *, int64_t, const void *, void *, int64_t);
int64_t gather_between(Meeting *, const char *, char *, int64_t);
void abort_between(Meeting *);
int64_t board_bytes(int64_t);
int64_t post(Board *, const int64_t *, int64_t, int64_t, const char *, int64_t);
int64_t take(Board *, int64_t, int64_t, char *, int64_t);
}

namespace {

constexpr int64_t CAPACITY = 1 << 15, LINE = 64, LONGEST = 65536 - 64;
constexpr uint32_t FIRST_TURN = 0xffffff00; // the counters pass the end of 32 bits
std::atomic<int> wrong{0};

void expect(bool right, const char *what) {
  if (!right && wrong.fetch_add(1) == 0) std::fprintf(stderr, "wrong: %s\n", what);
}

struct Memory { // zeros, on lines of its own
  char *begin;
  explicit Memory(int64_t bytes) : begin((char *)std::aligned_alloc(LINE, (bytes + LINE - 1) / LINE * LINE)) {
    std::memset(begin, 0, bytes);
  }
  ~Memory() { std::free(begin); }
};

struct MeetingPlace : Memory {
  explicit MeetingPlace(int64_t size) : Memory((2 + size) * LINE + 2 * size * CAPACITY) {
    for (int64_t rank = 0; rank < size; rank++) ((Shared *)begin)->counters[rank].turn.store(FIRST_TURN);
  }
};

template <class Work>
void on_ranks(int64_t size, Work work) { // each in a thread
  std::vector<std::thread> threads;
  for (int64_t rank = 0; rank < size; rank++) threads.emplace_back(work, rank);
  for (auto &thread : threads) thread.join();
}

Meeting meeting(MeetingPlace &memory, int64_t own, int64_t size, int64_t spin_ns) {
  return {(Shared *)memory.begin, memory.begin + (2 + size) * LINE, own, size, CAPACITY, FIRST_TURN, spin_ns, 60'000'000'000};
}

float value(int64_t rank, int64_t i) { return (float)((rank + 1) * (i % 7)); } // sums of these are exact in any type

template <class T>
void exchanges(Meeting *m, Type type, int64_t numbers) { // of each rank's part
  int64_t all = numbers * m->size;
  std::vector<T> x(all), sum(all), own(numbers), whole(all), columns(m->size * all);
  for (int64_t i = 0; i < all; i += 16) {
    float v[16];
    for (int64_t j = 0; j < 16; j++) v[j] = value(m->own, i + j);
    narrow(&x[i], load<F16>(v), all - i);
  }
  expect(!sum_between(m, type, x.data(), sum.data(), all), "a sum ends");
  expect(!scatter_between(m, type, x.data(), own.data(), numbers), "a dealt sum ends");
  expect(!gather_between(m, (const char *)own.data(), (char *)whole.data(), numbers * sizeof(T)), "rows are gathered");
  char *into = m->own ? nullptr : (char *)columns.data();
  expect(!gather_between(m, (const char *)x.data(), into, all * sizeof(T)), "columns are gathered");
  float ranks = (float)(m->size * (m->size + 1) / 2);
  for (int64_t i = 0; i < all; i++) expect(widen(&sum[i], 1)[0] == ranks * (float)(i % 7), "a sum");
  expect(!std::memcmp(sum.data(), whole.data(), all * sizeof(T)), "gathered rows of a dealt sum are the sum");
  expect(m->own || !std::memcmp(columns.data(), x.data(), all * sizeof(T)), "columns");
  expect(!sum_between(m, type, sum.data(), sum.data(), all), "a sum in place ends");
}

void sums(int64_t size, int64_t spin_ns) {
  MeetingPlace memory(size);
  on_ranks(size, [&](int64_t rank) {
    Meeting m = meeting(memory, rank, size, spin_ns);
    for (int64_t numbers : {1, 15, 100, 3000, 9000}) {
      exchanges<float>(&m, FLOAT32, numbers);
      exchanges<bf16>(&m, BFLOAT16, numbers);
      exchanges<fp16>(&m, FLOAT16, numbers);
    }
  });
}

void given_up() {
  MeetingPlace memory(3);
  on_ranks(3, [&](int64_t rank) {
    Meeting m = meeting(memory, rank, 3, 0);
    float x[4] = {1, 2, 3, 4};
    if (rank == 0) abort_between(&m);
    else expect(sum_between(&m, FLOAT32, x, x, 4) == ABORTED, "who waits is told");
  });
}

int64_t length(int64_t number) { return number % 9 == 0 ? LONGEST + 1 : number * 977 % (number % 3 ? 300 : LONGEST); }

void messages(int64_t readers, int64_t count) {
  Memory memory(board_bytes(readers));
  Board *board = (Board *)memory.begin;
  std::vector<int64_t> all;
  for (int64_t reader = 0; reader < readers; reader++) all.push_back(reader);
  on_ranks(readers + 1, [&](int64_t rank) {
    std::vector<char> bytes(LONGEST + 1);
    for (int64_t number = 1; number <= count; number++) {
      int64_t size = length(number), got;
      if (rank == readers) { // it posts
        std::memset(bytes.data(), (int)number, size);
        while (post(board, all.data(), readers, number, bytes.data(), size)) std::this_thread::yield();
        continue;
      }
      do got = take(board, rank, number, bytes.data(), 1'000'000);
      while (got < 0);
      expect(got == size, "a message's length");
      for (int64_t i = 0; got <= LONGEST && i < got; i++) expect(bytes[i] == (char)number, "a message");
    }
  });
}

} // namespace

int main() {
  for (int64_t size : {2, 3, 4})
    for (int64_t spin_ns : {0, 200'000}) sums(size, spin_ns);
  given_up();
  messages(1, 400);
  messages(3, 400);
  std::printf("%d wrong\n", wrong.load());
  return wrong ? 1 : 0;
}
