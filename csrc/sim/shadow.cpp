#include "sim/shadow.h"

#include <algorithm>
#include <string>

#include "sim/machine.h"

namespace fxprune::sim {

using std::to_string;

void Clocks::reset(int threads) {
  rows_.assign(threads, Row(threads, 0));
  for (int t = 0; t < threads; ++t) rows_[t][t] = 1;
}

void Clocks::join(Row* into, const Row& from) {
  if (into->size() < from.size()) into->resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) (*into)[i] = std::max((*into)[i], from[i]);
}

void Clocks::learn(int thread, const Row& published) {
  const uint32_t own = now(thread);
  join(&rows_[thread], published);
  rows_[thread][thread] = own;
}

// ---- shared memory ----

void SharedShadow::reset(char* memory, int64_t bytes, int threads, const Clocks* clocks) {
  memory_ = memory;
  bytes_ = bytes;
  warps_ = (threads + 31) / 32;
  clocks_ = clocks;
  cells_.assign((bytes + 1) / 2, Cell());
  readers_.assign(cells_.size() * warps_, Reader());
  fences_.assign(threads, 0);
  stamp_ = 0;
}

int64_t SharedShadow::first_cell(const void* at, int64_t bytes, int64_t align,
                                 const char* verb) const {
  const int64_t offset = static_cast<const char*>(at) - memory_;
  if (offset < 0 || offset + bytes > bytes_) {
    fault(std::string(verb) + " " + to_string(bytes) + " bytes at " + to_string(offset) + " of " +
          to_string(bytes_) + " bytes of shared memory");
  }
  if (offset % align != 0) {
    fault(std::string(verb) + " shared memory at " + to_string(offset) +
          ", which is not aligned to " + to_string(align));
  }
  return offset / 2;
}

void SharedShadow::check_read(int thread, int64_t i) const {
  const Cell& cell = cells_[i];
  const auto bad = [&](const std::string& what) {
    fault(what + " at byte " + to_string(2 * i) + " of shared memory");
  };
  if (cell.copier >= 0) {
    bad("reads what a copy of thread " + to_string(cell.copier) + " is still writing");
  }
  if (cell.writer < 0) bad("reads uninitialised bytes");
  if (!clocks_->knows(thread, cell.writer, cell.moment)) {
    bad("reads in a race with the write of thread " + to_string(cell.writer));
  }
}

void SharedShadow::read(int thread, const void* at, int64_t bytes, int64_t align) {
  const int64_t first = first_cell(at, bytes, align, "reads");
  for (int64_t i = first; i < first + (bytes + 1) / 2; ++i) {
    check_read(thread, i);
    readers_[i * warps_ + thread / 32] = {clocks_->now(thread), static_cast<int16_t>(thread)};
  }
}

void SharedShadow::check_write(int thread, int64_t i, const char* verb) {
  const Cell& cell = cells_[i];
  const auto bad = [&](const std::string& what, int other) {
    fault(std::string(verb) + " " + what + " thread " + to_string(other) + " at byte " +
          to_string(2 * i) + " of shared memory");
  };
  if (cell.copier >= 0) bad("what is being copied by", cell.copier);
  if (cell.products > 0) bad("what a matrix instruction is still reading, as", thread);
  if (cell.writer >= 0 && !clocks_->knows(thread, cell.writer, cell.moment)) {
    bad("in a race with the write of", cell.writer);
  }
  for (int w = 0; w < warps_; ++w) {
    const Reader& reader = readers_[i * warps_ + w];
    if (reader.thread >= 0 && !clocks_->knows(thread, reader.thread, reader.moment)) {
      bad("in a race with the read of", reader.thread);
    }
  }
}

void SharedShadow::note_write(int thread, uint32_t moment, int64_t i, bool ordinary) {
  Cell& cell = cells_[i];
  cell.writer = static_cast<int16_t>(thread);
  cell.moment = moment;
  cell.ordinary = ordinary;
  cell.stamp = ++stamp_;
  std::fill_n(readers_.begin() + i * warps_, warps_, Reader());
}

void SharedShadow::write(int thread, const void* at, int64_t bytes, int64_t align) {
  const int64_t first = first_cell(at, bytes, align, "writes");
  for (int64_t i = first; i < first + (bytes + 1) / 2; ++i) {
    check_write(thread, i, "writes");
    note_write(thread, clocks_->now(thread), i, true);
  }
}

void SharedShadow::begin_copy(int thread, const void* at, int64_t bytes, int64_t align) {
  const int64_t first = first_cell(at, bytes, align, "copies into");
  for (int64_t i = first; i < first + (bytes + 1) / 2; ++i) {
    check_write(thread, i, "copies into");
    cells_[i].copier = static_cast<int16_t>(thread);
  }
}

void SharedShadow::end_copy(int thread, uint32_t moment, const void* at, int64_t bytes,
                            bool ordinary) {
  const int64_t first = first_cell(at, bytes, 1, "copies into");
  for (int64_t i = first; i < first + (bytes + 1) / 2; ++i) {
    cells_[i].copier = -1;
    note_write(thread, moment, i, ordinary);
  }
}

void SharedShadow::begin_product(int thread, const void* at) {
  const int64_t i = first_cell(at, 2, 2, "reads");
  check_read(thread, i);
  Cell& cell = cells_[i];
  if (cell.ordinary && fences_[cell.writer] < cell.stamp) {
    fault("gives a matrix instruction what thread " + to_string(cell.writer) +
          " wrote without a proxy fence");
  }
  ++cell.products;
}

void SharedShadow::end_product(int first, const void* at) {
  const int64_t i = first_cell(at, 2, 2, "reads");
  --cells_[i].products;
  for (int t = first; t < first + 128; t += 32) {
    readers_[i * warps_ + t / 32] = {clocks_->now(t), static_cast<int16_t>(t)};
  }
}

// ---- global memory ----

void GlobalShadow::declare(const void* data, int64_t bytes, bool writable) {
  ranges_.push_back({static_cast<const char*>(data), bytes, writable,
                     std::vector<uint8_t>(writable ? bytes : 0, 0)});
}

void GlobalShadow::begin_launch() {
  for (Range& range : ranges_) {
    for (uint8_t& state : range.state) state = std::min<uint8_t>(state, 1);
  }
}

GlobalShadow::Range& GlobalShadow::find(const void* at, int64_t bytes, int64_t align,
                                        const char* verb) {
  const char* p = static_cast<const char*>(at);
  for (Range& range : ranges_) {
    if (p < range.begin || p + bytes > range.begin + range.bytes) continue;
    if (reinterpret_cast<uintptr_t>(p) % align != 0) {
      fault(std::string(verb) + " global memory at byte " + to_string(p - range.begin) +
            " of a buffer, which is not aligned to " + to_string(align));
    }
    return range;
  }
  std::string near;
  for (const Range& range : ranges_) {
    if (p >= range.begin - 4096 && p < range.begin + range.bytes + 4096) {
      near += "; byte " + to_string(p - range.begin) + " of a buffer of " + to_string(range.bytes);
    }
  }
  fault(std::string(verb) + " " + to_string(bytes) + " bytes outside of every global buffer" +
        near);
}

void GlobalShadow::read(const void* at, int64_t bytes, int64_t align) {
  if (trusted_) return;
  const Range& range = find(at, bytes, align, "reads");
  if (!range.writable) return;
  const int64_t first = static_cast<const char*>(at) - range.begin;
  for (int64_t i = first; i < first + bytes; ++i) {
    if (range.state[i] == 0) fault("reads byte " + to_string(i) + " of an output nobody wrote");
    if (range.state[i] == 2) fault("reads byte " + to_string(i) + " written in the same launch");
  }
}

void GlobalShadow::write(const void* at, int64_t bytes, int64_t align) {
  if (trusted_) return;
  Range& range = find(at, bytes, align, "writes");
  if (!range.writable) fault("writes a buffer that is only to be read");
  const int64_t first = static_cast<const char*>(at) - range.begin;
  for (int64_t i = first; i < first + bytes; ++i) {
    if (range.state[i] == 2) {
      fault("writes byte " + to_string(i) + " of an output for the second time");
    }
    range.state[i] = 2;
  }
}

bool GlobalShadow::all_written(const void* data) const {
  for (const Range& range : ranges_) {
    if (range.begin == data && range.writable) {
      return std::all_of(range.state.begin(), range.state.end(), [](uint8_t s) { return s > 0; });
    }
  }
  return false;
}

}  // namespace fxprune::sim
