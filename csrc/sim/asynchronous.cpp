// What goes on beside the threads: copies, mbarriers, matrix instructions of a warpgroup.
#include <algorithm>
#include <cstring>

#include "sim/state.h"

namespace fxprune::sim {

void Machine::finish_copies(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    shared.end_copy(self(), clocks.now(self()), copy.to, copy.bytes, true);
    std::memset(copy.to, 0, copy.bytes);
    std::memcpy(copy.to, copy.from, copy.valid);
  }
}

Mbarrier& Machine::mbarrier(const void* at) {
  const auto found = mbarriers.find(at);
  if (found == mbarriers.end()) fault("uses an mbarrier that nobody initialised");
  Mbarrier& b = found->second;
  if (!clocks.knows(self(), b.initialiser, b.moment)) {
    fault("uses an mbarrier before the thread that initialised it has met it at a barrier");
  }
  return b;
}

void Machine::complete(Mbarrier* b) {
  if (b->pending > 0 || b->bytes != 0) return;
  b->published = b->gathered;
  b->pending = b->expected;
  ++b->phase;
}

bool Machine::land() {
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

// ---- registers ----

void registers_release(int count) {
  Machine& m = machine();
  Thread& t = m.thread();
  if (count > t.registers) fault("keeps " + std::to_string(count) + " registers of fewer");
  m.registers.free += t.registers - count;
  t.registers = count;
  ++m.registers.releases;
}

void registers_acquire(int count) {
  Machine& m = machine();
  Thread& t = m.thread();
  if (count < t.registers) fault("asks for " + std::to_string(count) + " registers and has more");
  while (m.registers.free < count - t.registers) m.wait(&m.registers.releases, "registers");
  m.registers.free -= count - t.registers;
  t.registers = count;
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
