#include "sim/machine.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "sim/state.h"

namespace fxprune::sim {

std::string Machine::waiting() const {
  std::map<std::string, std::vector<int>> reasons;
  for (int t = 0; t < place.threads; ++t) {
    if (!threads[t].fiber->done()) reasons[threads[t].waits_for].push_back(t);
  }
  std::string text;
  for (const auto& [reason, who] : reasons) {
    text += "; " + std::to_string(who.size()) + " threads from " + std::to_string(who.front()) +
            " on wait at " + reason;
  }
  return text;
}

void Machine::run_block(int count, int registers_each, int64_t shared_bytes,
                        const std::function<void()>& kernel) {
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
  if (threads.size() < static_cast<size_t>(count)) threads.resize(count);  // stacks are kept
  registers = {};
  for (int t = 0; t < count; ++t) {
    Thread& thread = threads[t];
    if (!thread.fiber) thread.fiber = std::make_unique<Fiber>();
    thread.counter = nullptr;
    thread.registers = registers_each;
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

Machine& machine() {
  static Machine m;
  return m;
}

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

int64_t most_shared() {
  return machine().most_shared;
}

void reset(uint32_t seed, Plant plant, int64_t most_shared) {
  machine().most_shared = most_shared;
  machine().global.clear();
  machine().seed = seed;
  machine().plant = plant;
}

void trust_global_memory() {
  machine().global.trust();
}

bool all_written(const void* data) {
  return machine().global.all_written(data);
}

void launch(const int64_t (&grid)[3], int threads, int blocks, int64_t shared_bytes,
            const std::function<void()>& kernel) {
  constexpr int64_t kMostY = 65535;
  // What the compiler allows a thread where so many blocks are to fit, in steps of 8.
  const int allowed = 65536 / (threads * blocks) / 8 * 8, registers = allowed < 256 ? allowed : 256;
  if (grid[0] < 1 || grid[1] < 1 || grid[2] < 1 || grid[0] > INT32_MAX || grid[1] > kMostY ||
      grid[2] > kMostY || threads < 1 || threads > 1024 || shared_bytes > machine().most_shared) {
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
        m.run_block(threads, registers, shared_bytes, kernel);
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

}  // namespace fxprune::sim
