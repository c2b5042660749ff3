// What follows from sizes alone is computed once for each set of sizes, not once a call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace fxprune {

using Geometry = std::vector<int64_t>;  // every size that the tables depend on

// Tables: immutable once made.
template <class Tables, class Key = Geometry>
class GeometryCache {
 public:
  template <class F>
  std::shared_ptr<const Tables> get(const Key& key, const F& make) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (const auto found = tables_.find(key); found != tables_.end()) return found->second;
    }
    std::shared_ptr<const Tables> made = make();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (tables_.size() >= kMost) tables_.clear();  // calls that run hold their own
    tables_.emplace(key, made);
    return made;
  }

 private:
  static constexpr size_t kMost = 512;
  std::mutex mutex_;
  std::map<Key, std::shared_ptr<const Tables>> tables_;
};

}  // namespace fxprune
