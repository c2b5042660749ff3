// Buffers that outlive a call, so that a call does not fault its pages in anew.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace fxprune {

class ArenaPool {
 public:
  std::vector<std::byte> take(int64_t bytes) {
    std::vector<std::byte> buffer;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        buffer = std::move(free_.back());
        free_.pop_back();
      }
    }
    if (static_cast<int64_t>(buffer.size()) < bytes) buffer.resize(bytes);
    return buffer;
  }
  void give(std::vector<std::byte> buffer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(buffer));
  }

  static ArenaPool& shared() {
    static ArenaPool pool;
    return pool;
  }

 private:
  std::mutex mutex_;
  std::vector<std::vector<std::byte>> free_;
};

// Room for `bytes` bytes of arbitrary contents, from a cache line on; given back at the end.
class Arena {
 public:
  explicit Arena(int64_t bytes) : buffer_(ArenaPool::shared().take(bytes + kLine)) {}
  ~Arena() { ArenaPool::shared().give(std::move(buffer_)); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <class T>
  T* data() {
    const uintptr_t address = reinterpret_cast<uintptr_t>(buffer_.data());
    return reinterpret_cast<T*>((address + kLine - 1) & ~uintptr_t{kLine - 1});
  }

 private:
  static constexpr int64_t kLine = 64;
  std::vector<std::byte> buffer_;
};

}  // namespace fxprune
