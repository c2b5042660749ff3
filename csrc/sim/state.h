// The simulated block as the simulator's own files see it.
#pragma once

#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "sim/fiber.h"
#include "sim/machine.h"
#include "sim/shadow.h"

namespace fxprune::sim {

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
  int registers = 0;
};

// Registers of a block that no thread has, and how often some were given back.
struct Registers {
  int free = 0;
  uint64_t releases = 0;
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
  Registers registers;
  std::exception_ptr failure;
  std::mt19937 random;
  uint32_t seed = 0;
  Plant plant = Plant::kNone;
  int64_t most_shared = kMostShared;

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

  void finish_copies(const std::vector<Copy>& copies);
  Mbarrier& mbarrier(const void* at);
  static void complete(Mbarrier* b);
  // Lands the oldest bulk copy; false when there is none.
  bool land();

  void run_block(int count, int registers_each, int64_t shared_bytes,
                 const std::function<void()>& kernel);
  std::string waiting() const;
};

Machine& machine();

}  // namespace fxprune::sim
