// Threads that run many sections of work one after the other in a single parallel call.
//
// Every member runs the same code and so meets the same sections in the same order. A section's
// units are shared out; a member leaves it when all units are done, whoever did them. Nothing waits
// for a member, only for units that one has begun: a member that starts late, or after the others
// have finished (fewer threads than members), finds its units done.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <stdexcept>
#include <thread>

namespace fxprune {

class Crew {
 public:
  // sections: the most that a run meets.
  Crew(int64_t members, int64_t sections)
      : members_(members), sections_(sections), counts_(new Count[sections * (members + 1)]) {}

  int64_t members() const { return members_; }

  // The section this thread meets next, or null outside a crew.
  class Member {
   public:
    // Calls f(unit) for the units in [0, count) that fall to this member: first those of its own
    // contiguous range, then what the others have left. Returns when all are done.
    template <class F>
    void share(int64_t count, const F& f) {
      if (at_ >= crew_.sections_) throw std::logic_error("a crew met too many sections");
      Count* counts = &crew_.counts_[at_++ * (crew_.members_ + 1)];
      int64_t mine = 0;
      for (int64_t step = 0; step < crew_.members_ && !crew_.failed(); ++step) {
        const int64_t owner = (self_ + step) % crew_.members_;
        const int64_t begin = count * owner / crew_.members_,
                      end = count * (owner + 1) / crew_.members_;
        while (counts[1 + owner].value.load(std::memory_order_relaxed) < end - begin) {
          const int64_t unit =
              begin + counts[1 + owner].value.fetch_add(1, std::memory_order_relaxed);
          if (unit >= end) break;
          f(unit);
          ++mine;
        }
      }
      counts->value.fetch_add(mine, std::memory_order_release);
      for (int64_t spins = 0; counts->value.load(std::memory_order_acquire) < count; ++spins) {
        if (crew_.failed()) return;
        spins < kSpins ? pause() : std::this_thread::yield();
      }
    }

    static Member* current() { return here(); }

   private:
    friend class Crew;
    Member(Crew& crew, int64_t self) : crew_(crew), self_(self) { here() = this; }
    ~Member() { here() = nullptr; }
    Member(const Member&) = delete;
    Member& operator=(const Member&) = delete;

    static Member*& here() {
      static thread_local Member* member = nullptr;
      return member;
    }

    Crew& crew_;
    int64_t self_, at_ = 0;
  };

  // Runs `work` as one member, and keeps what it throws: the others then stop waiting.
  template <class W>
  void run_member(int64_t self, const W& work) {
    try {
      Member member(*this, self);
      work();
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }

  // After every member has returned.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  struct alignas(64) Count {
    std::atomic<int64_t> value{0};
  };

  static constexpr int64_t kSpins = 4096;  // some 100 us, longer than a section is uneven

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  bool failed() const { return failed_.load(std::memory_order_relaxed); }

  int64_t members_, sections_;
  std::unique_ptr<Count[]> counts_;  // per section: units done, then units taken of each range
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

}  // namespace fxprune
