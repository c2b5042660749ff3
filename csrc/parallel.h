// Runs units of work on torch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <vector>

#include "crew.h"

namespace fxprune {

// Calls f(unit) for every unit in [0, count), on `threads` threads. Each thread owns a contiguous
// range, so that consecutive operators find their data in the same core's cache; one that is done
// early takes from the others. A member of a crew shares the units with its crew, however many
// threads are asked for.
template <class F>
void for_each_unit(int64_t count, int64_t threads, const F& f) {
  if (Crew::Member* member = Crew::Member::current()) return member->share(count, f);
  threads = std::min(threads, count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Range> ranges(threads);
  for (int64_t t = 0; t < threads; ++t) {
    ranges[t].next.store(count * t / threads, std::memory_order_relaxed);
    ranges[t].end = count * (t + 1) / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t self = begin; self < end; ++self) {
      for (int64_t step = 0; step < threads; ++step) {
        Range& range = ranges[(self + step) % threads];
        for (;;) {
          const int64_t unit = range.next.fetch_add(1, std::memory_order_relaxed);
          if (unit >= range.end) break;
          f(unit);
        }
      }
    }
  });
}

// The same over several items: f(item, unit) for counts[item] units of each.
template <class F>
void for_each_unit_of(const std::vector<int64_t>& counts, int64_t threads, const F& f) {
  if (counts.empty()) return;
  std::vector<int64_t> ends(counts.size());
  std::partial_sum(counts.begin(), counts.end(), ends.begin());
  for_each_unit(ends.back(), threads, [&](int64_t unit) {
    const size_t item = std::upper_bound(ends.begin(), ends.end(), unit) - ends.begin();
    f(item, unit - (ends[item] - counts[item]));
  });
}

// Calls work() on `threads` threads, as the members of a crew: what it cuts with for_each_unit, at
// most `sections` times, is shared by all of them.
template <class W>
void run_crew(int64_t threads, int64_t sections, const W& work) {
  if (threads <= 1) return work();
  Crew crew(threads, sections);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t self = begin; self < end; ++self) crew.run_member(self, work);
  });
  crew.rethrow();
}

// This thread's buffer of at least `count` floats, aligned to cache lines. Its contents are
// arbitrary. Slot: for those that are used at the same time.
template <int Slot = 0>
float* scratch(int64_t count) {
  static thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < count + 16) buffer.resize(count + 16);
  const uintptr_t address = reinterpret_cast<uintptr_t>(buffer.data());
  return reinterpret_cast<float*>((address + 63) & ~uintptr_t{63});
}

// The same, of numbers of another type.
template <int Slot, class T>
T* scratch_of(int64_t count) {
  const int64_t floats = (count * static_cast<int64_t>(sizeof(T)) + 3) / 4;
  return reinterpret_cast<T*>(scratch<Slot>(floats));
}

}  // namespace fxprune
