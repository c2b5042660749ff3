// What the simulator knows about every byte: of shared memory who touched it last and what is
// still under way; of global memory what the test declared and what was written.
#pragma once

#include <cstdint>
#include <vector>

namespace fxprune::sim {

// One vector clock per thread: clock[t][u] is the last moment of thread u that thread t knows of.
class Clocks {
 public:
  using Row = std::vector<uint32_t>;
  void reset(int threads);
  uint32_t now(int thread) const { return rows_[thread][thread]; }
  bool knows(int thread, int other, uint32_t moment) const {
    return other == thread || rows_[thread][other] >= moment;
  }
  const Row& row(int thread) const { return rows_[thread]; }
  // What `thread` did so far is published with its row; what it does from now on is not.
  void advance(int thread) { ++rows_[thread][thread]; }
  void learn(int thread, const Row& published);
  static void join(Row* into, const Row& from);

 private:
  std::vector<Row> rows_;
};

// Shared memory in cells of two bytes.
class SharedShadow {
 public:
  void reset(char* memory, int64_t bytes, int threads, const Clocks* clocks);

  // Each faults when the access is out of bounds, not aligned to `align`, or races.
  void read(int thread, const void* at, int64_t bytes, int64_t align);
  void write(int thread, const void* at, int64_t bytes, int64_t align);
  // An asynchronous copy into the bytes: from begin to end nobody may touch them. `ordinary`: the
  // bytes count as written without a proxy fence.
  void begin_copy(int thread, const void* at, int64_t bytes, int64_t align);
  void end_copy(int thread, uint32_t moment, const void* at, int64_t bytes, bool ordinary);
  // A matrix instruction that reads the two bytes at `at`: until the end nobody may write them. The
  // read counts for the first lane of each warp of the warpgroup that begins at thread `first`.
  void begin_product(int thread, const void* at);
  void end_product(int first, const void* at);
  void fence(int thread) { fences_[thread] = ++stamp_; }

 private:
  struct Cell {
    uint32_t moment = 0;    // of the last write, by the writer's clock
    int16_t writer = -1;    // -1: never written
    int16_t copier = -1;    // a copy is under way
    int16_t products = 0;   // matrix instructions under way that read it
    bool ordinary = false;  // written by a store or cp.async ...
    uint64_t stamp = 0;     // ... at this moment, for proxy fences
  };
  struct Reader {  // the last reader of each warp
    uint32_t moment = 0;
    int16_t thread = -1;
  };

  int64_t first_cell(const void* at, int64_t bytes, int64_t align, const char* verb) const;
  void check_read(int thread, int64_t cell) const;
  void check_write(int thread, int64_t cell, const char* verb);
  void note_write(int thread, uint32_t moment, int64_t cell, bool ordinary);

  char* memory_ = nullptr;
  int64_t bytes_ = 0;
  int warps_ = 0;
  const Clocks* clocks_ = nullptr;
  std::vector<Cell> cells_;
  std::vector<Reader> readers_;   // [cell][warp]
  std::vector<uint64_t> fences_;  // per thread, the stamp of its last proxy fence
  uint64_t stamp_ = 0;
};

class GlobalShadow {
 public:
  void clear() {
    ranges_.clear();
    trusted_ = false;
  }
  void trust() { trusted_ = true; }
  void declare(const void* data, int64_t bytes, bool writable);
  void begin_launch();
  void read(const void* at, int64_t bytes, int64_t align);
  void write(const void* at, int64_t bytes, int64_t align);
  bool all_written(const void* data) const;

 private:
  struct Range {
    const char* begin;
    int64_t bytes;
    bool writable;
    std::vector<uint8_t>
        state;  // per byte of writable memory: 0 unwritten, 1 earlier, 2 this launch
  };
  Range& find(const void* at, int64_t bytes, int64_t align, const char* verb);
  std::vector<Range> ranges_;
  bool trusted_ = false;  // nothing is checked
};

}  // namespace fxprune::sim
