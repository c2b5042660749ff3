#include "sim/machine.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "sim/fiber.h"
#include "sim/shadow.h"

namespace fxprune::sim {
namespace {

struct Copy {
  char* to;
  const char* from;
  int bytes, valid;
};

struct Bulk {
  char* to;
  const char* from;
  int64_t bytes;
  char* barrier;
  int thread;
  Clocks::Row known;  // of the thread, when it started the copy
};

// Threads that meet: a barrier, or the lanes of a collective.
struct Meeting {
  uint64_t generation = 0;
  std::vector<int> arrived;
  std::vector<void*> brought;
  std::string name;
};

struct Mbarrier {
  int expected, pending;
  int64_t bytes = 0;  // still to be copied in this phase
  uint64_t phase = 0;
  int initialiser;
  uint32_t moment;
  Clocks::Row gathered, published;
};

struct Thread {
  std::unique_ptr<Fiber> fiber;
  const uint64_t* counter = nullptr;  // waits until it differs from `seen`
  uint64_t seen = 0;
  std::string waits_for;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

// One warpgroup's matrix instructions.
struct Products {
  bool fenced = false;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
};

struct Machine {
  Place place{};
  std::vector<Thread> threads;
  std::vector<char> memory;
  Clocks clocks;
  SharedShadow shared;
  GlobalShadow global;
  std::map<int64_t, Meeting> meetings;
  std::map<const void*, Mbarrier> mbarriers;
  std::vector<Products> products;
  std::deque<Bulk> bulk;
  std::exception_ptr failure;
  std::mt19937 random;
  uint32_t seed = 0;
  Plant plant = Plant::kNone;

  int self() const { return place.thread; }
  Thread& thread() { return threads[place.thread]; }

  void wait(const uint64_t* counter, const std::string& what) {
    Thread& t = thread();
    t.counter = counter;
    t.seen = *counter;
    t.waits_for = what;
    const int id = self();
    t.fiber->yield();
    place.thread = id;
  }

  // True for the one that completes the meeting, which must then call close().
  bool meet(Meeting* m, size_t count, const std::string& name, void* brought = nullptr) {
    if (m->arrived.empty()) m->name = name;
    if (m->name != name) fault("reaches " + name + " while others of its group are at " + m->name);
    m->arrived.push_back(self());
    m->brought.push_back(brought);
    if (m->arrived.size() == count) return true;
    wait(&m->generation, name);
    return false;
  }

  static void close(Meeting* m) {
    m->arrived.clear();
    m->brought.clear();
    ++m->generation;
  }

  // Everyone who arrived knows what everyone did before.
  void synchronise(const Meeting& m) {
    Clocks::Row all;
    for (int t : m.arrived) Clocks::join(&all, clocks.row(t));
    for (int t : m.arrived) {
      clocks.learn(t, all);
      clocks.advance(t);
    }
  }

  void finish_copies(const std::vector<Copy>& copies) {
    for (const Copy& copy : copies) {
      shared.end_copy(self(), clocks.now(self()), copy.to, copy.bytes, true);
      std::memset(copy.to, 0, copy.bytes);
      std::memcpy(copy.to, copy.from, copy.valid);
    }
  }

  Mbarrier& mbarrier(const void* at) {
    const auto found = mbarriers.find(at);
    if (found == mbarriers.end()) fault("uses an mbarrier that nobody initialised");
    Mbarrier& b = found->second;
    if (!clocks.knows(self(), b.initialiser, b.moment)) {
      fault("uses an mbarrier before the thread that initialised it has met it at a barrier");
    }
    return b;
  }

  static void complete(Mbarrier* b) {
    if (b->pending > 0 || b->bytes != 0) return;
    b->published = b->gathered;
    b->pending = b->expected;
    ++b->phase;
  }

  // Lands the oldest bulk copy; false when there is none.
  bool land() {
    if (bulk.empty()) return false;
    const Bulk copy = bulk.front();
    bulk.pop_front();
    shared.end_copy(copy.thread, copy.known[copy.thread], copy.to, copy.bytes, false);
    std::memcpy(copy.to, copy.from, copy.bytes);
    Mbarrier& b = mbarriers.at(copy.barrier);
    Clocks::join(&b.gathered, copy.known);
    b.bytes -= copy.bytes;
    complete(&b);
    return true;
  }

  void run_block(int count, int64_t shared_bytes, const std::function<void()>& kernel);
  std::string waiting() const;
};

Machine& machine() {
  static Machine m;
  return m;
}

std::string Machine::waiting() const {
  std::map<std::string, std::vector<int>> reasons;
  for (size_t t = 0; t < threads.size(); ++t) {
    if (!threads[t].fiber->done()) reasons[threads[t].waits_for].push_back(static_cast<int>(t));
  }
  std::string text;
  for (const auto& [reason, who] : reasons) {
    text += "; " + std::to_string(who.size()) + " threads from " + std::to_string(who.front()) +
            " on wait at " + reason;
  }
  return text;
}

void Machine::run_block(int count, int64_t shared_bytes, const std::function<void()>& kernel) {
  // 1024-byte alignment, as the 128-byte swizzle wants; NaN in every element type.
  memory.assign(shared_bytes + 1024, static_cast<char>(0xff));
  char* base = memory.data();
  base += (1024 - reinterpret_cast<uintptr_t>(base) % 1024) % 1024;
  place.shared = base;
  place.threads = count;
  clocks.reset(count);
  shared.reset(base, shared_bytes, count, &clocks);
  meetings.clear();
  mbarriers.clear();
  bulk.clear();
  products.assign((count + 127) / 128, Products());
  threads.resize(count);
  for (int t = 0; t < count; ++t) {
    Thread& thread = threads[t];
    if (!thread.fiber) thread.fiber = std::make_unique<Fiber>();
    thread.counter = nullptr;
    thread.open.clear();
    thread.groups.clear();
    thread.fiber->start([this, &kernel] {
      try {
        kernel();
        for (const std::vector<Copy>& group : this->thread().groups) {
          if (!group.empty()) fault("ends with copies that it never waited for");
        }
      } catch (...) {
        failure = std::current_exception();
      }
    });
  }
  std::vector<int> order(count);
  for (int t = 0; t < count; ++t) order[t] = seed == 1 ? count - 1 - t : t;
  if (seed > 1) random.seed(seed);
  while (true) {
    if (seed > 1) std::shuffle(order.begin(), order.end(), random);
    bool progress = false, alive = false;
    for (int t : order) {
      Thread& thread = threads[t];
      if (thread.fiber->done()) continue;
      alive = true;
      if (thread.counter != nullptr && *thread.counter == thread.seen) continue;
      thread.counter = nullptr;
      place.thread = t;
      thread.fiber->resume();
      progress = true;
      if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    }
    if (!alive) break;
    if (!progress && !land()) throw Fault("deadlock" + waiting());
  }
  if (!bulk.empty()) throw Fault("the block ended before a bulk copy of its own landed");
}

}  // namespace

void fault(const std::string& what) {
  const Place& p = machine().place;
  throw Fault("block (" + std::to_string(p.block[0]) + ", " + std::to_string(p.block[1]) + ", " +
              std::to_string(p.block[2]) + ") thread " + std::to_string(p.thread) + " " + what);
}

const Place& place() {
  return machine().place;
}

Plant planted() {
  return machine().plant;
}

void declare(const void* data, int64_t bytes, bool writable) {
  machine().global.declare(data, bytes, writable);
}

void reset(uint32_t seed, Plant plant) {
  machine().global.clear();
  machine().seed = seed;
  machine().plant = plant;
}

bool all_written(const void* data) {
  return machine().global.all_written(data);
}

void launch(const int64_t (&grid)[3], int threads, int64_t shared_bytes,
            const std::function<void()>& kernel) {
  constexpr int64_t kMostY = 65535, kMostShared = 227 << 10;
  if (grid[0] < 1 || grid[1] < 1 || grid[2] < 1 || grid[0] > INT32_MAX || grid[1] > kMostY ||
      grid[2] > kMostY || threads < 1 || threads > 1024 || shared_bytes > kMostShared) {
    throw Fault("a GPU would refuse this launch: grid " + std::to_string(grid[0]) + " x " +
                std::to_string(grid[1]) + " x " + std::to_string(grid[2]) + ", " +
                std::to_string(threads) + " threads, " + std::to_string(shared_bytes) +
                " bytes of shared memory");
  }
  Machine& m = machine();
  m.global.begin_launch();
  std::copy(grid, grid + 3, m.place.grid);
  for (int64_t z = 0; z < grid[2]; ++z) {
    for (int64_t y = 0; y < grid[1]; ++y) {
      for (int64_t x = 0; x < grid[0]; ++x) {
        m.place.block[0] = x, m.place.block[1] = y, m.place.block[2] = z;
        m.run_block(threads, shared_bytes, kernel);
      }
    }
  }
}

// ---- memory ----

void read_shared(void* to, const void* from, int bytes) {
  Machine& m = machine();
  m.shared.read(m.self(), from, bytes, bytes);
  std::memcpy(to, from, bytes);
}

void write_shared(void* to, const void* from, int bytes) {
  Machine& m = machine();
  m.shared.write(m.self(), to, bytes, bytes);
  std::memcpy(to, from, bytes);
}

void read_global(void* to, const void* from, int bytes) {
  machine().global.read(from, bytes, bytes);
  std::memcpy(to, from, bytes);
}

void write_global(void* to, const void* from, int bytes) {
  machine().global.write(to, bytes, bytes);
  std::memcpy(to, from, bytes);
}

// ---- barriers ----

void barrier(int id, int threads) {
  Machine& m = machine();
  if (m.plant == Plant::kNoBarrier) return;
  Meeting& meeting = m.meetings[id];
  if (!m.meet(&meeting, threads, "barrier " + std::to_string(id))) return;
  m.synchronise(meeting);
  Machine::close(&meeting);
}

void sync_warp() {
  Machine& m = machine();
  Meeting& meeting = m.meetings[1000 + m.self() / 32];
  const int lanes = std::min(32, m.place.threads - m.self() / 32 * 32);
  if (!m.meet(&meeting, lanes, "a warp synchronisation")) return;
  m.synchronise(meeting);
  Machine::close(&meeting);
}

void collective(const char* name, int lanes, void* brought,
                const std::function<void(void* const*)>& work) {
  Machine& m = machine();
  Meeting& meeting = m.meetings[(lanes == 32 ? 1000 : 2000) + m.self() / lanes];
  if (!m.meet(&meeting, lanes, name, brought)) return;
  std::vector<void*> ordered(lanes);
  for (int i = 0; i < lanes; ++i) ordered[meeting.arrived[i] % lanes] = meeting.brought[i];
  work(ordered.data());
  Machine::close(&meeting);
}

// ---- cp.async ----

void copy_async(void* to, const void* from, int bytes, int valid) {
  Machine& m = machine();
  if (valid > 0) m.global.read(from, valid, bytes);
  m.shared.begin_copy(m.self(), to, bytes, bytes);
  m.thread().open.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, valid});
}

void copy_commit() {
  Thread& t = machine().thread();
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

void copy_wait(int groups_left) {
  Machine& m = machine();
  if (m.plant == Plant::kShortWait) ++groups_left;
  std::deque<std::vector<Copy>>& groups = m.thread().groups;
  while (groups.size() > static_cast<size_t>(groups_left)) {
    m.finish_copies(groups.front());
    groups.pop_front();
  }
}

// ---- mbarriers and bulk copies ----

void mbarrier_init(void* at, int arrivals) {
  Machine& m = machine();
  char zeros[8] = {};
  m.shared.write(m.self(), at, 8, 8);
  std::memcpy(at, zeros, 8);
  Mbarrier b{};
  b.expected = b.pending = arrivals - (m.plant == Plant::kEarlyArrive && arrivals > 1 ? 1 : 0);
  b.initialiser = m.self();
  b.moment = m.clocks.now(m.self());
  m.mbarriers[at] = b;
}

void mbarrier_arrive(void* at, int64_t expect_bytes) {
  Machine& m = machine();
  Mbarrier& b = m.mbarrier(at);
  if (b.pending <= 0) fault("arrives at an mbarrier more often than was announced");
  Clocks::join(&b.gathered, m.clocks.row(m.self()));
  m.clocks.advance(m.self());
  b.bytes += expect_bytes;
  --b.pending;
  m.complete(&b);
}

void mbarrier_wait(void* at, int parity) {
  Machine& m = machine();
  Mbarrier& b = m.mbarrier(at);
  if (m.plant == Plant::kNoPhaseWait) return;
  while (static_cast<int>(b.phase & 1) == parity) {
    m.wait(&b.phase, "phase " + std::to_string(b.phase) + " of the mbarrier at byte " +
                         std::to_string(static_cast<char*>(at) - m.place.shared));
  }
  m.clocks.learn(m.self(), b.published);
}

void copy_bulk(void* to, const void* from, int64_t bytes, void* barrier) {
  Machine& m = machine();
  if (bytes % 16 != 0 || bytes == 0) fault("bulk copy of " + std::to_string(bytes) + " bytes");
  m.mbarrier(barrier);
  m.global.read(from, bytes, 16);
  m.shared.begin_copy(m.self(), to, bytes, 16);
  m.bulk.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes,
                    static_cast<char*>(barrier), m.self(), m.clocks.row(m.self())});
}

void fence_proxy() {
  Machine& m = machine();
  if (m.plant != Plant::kNoProxyFence) m.shared.fence(m.self());
}

// ---- warpgroup matrix instructions ----

void product_fence() {
  Machine& m = machine();
  if (m.plant != Plant::kNoMatrixFence) m.products[m.self() / 128].fenced = true;
}

void product_issue(Product product) {
  Machine& m = machine();
  Products& p = m.products[m.self() / 128];
  if (!p.fenced) fault("starts a matrix instruction without wgmma.fence since the last wait");
  product.operands([&m](const char* at) { m.shared.begin_product(m.self(), at); });
  p.open.push_back(std::move(product));
}

void product_commit() {
  Products& p = machine().products[machine().self() / 128];
  p.groups.push_back(std::move(p.open));
  p.open.clear();
}

void product_wait(int groups_left) {
  Machine& m = machine();
  Products& p = m.products[m.self() / 128];
  if (m.plant == Plant::kShortWait) ++groups_left;
  if (groups_left == 0) p.fenced = false;
  while (p.groups.size() > static_cast<size_t>(groups_left)) {
    for (const Product& product : p.groups.front()) {
      product.run();
      product.operands([&m](const char* at) { m.shared.end_product(m.self() / 128 * 128, at); });
    }
    p.groups.pop_front();
  }
}

}  // namespace fxprune::sim
