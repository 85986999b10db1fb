// SPDX-License-Identifier: Apache-2.0
//
// Aligned memory, and memory that is taken in the order of need and given back all at once.

#ifndef MOSS_NATIVE_ARENA_H_
#define MOSS_NATIVE_ARENA_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "tile.h"

namespace moss {

struct FreeAligned {
  void operator()(std::uint8_t* data) const { ::operator delete(data, std::align_val_t(kScratchAlignmentBytes)); }
};
using Memory = std::unique_ptr<std::uint8_t, FreeAligned>;

inline Memory allocate_aligned(std::int64_t bytes) {
  const auto size = static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1));
  return Memory(static_cast<std::uint8_t*>(::operator new(size, std::align_val_t(kScratchAlignmentBytes))));
}

// What a call has needed once is there for the next: one chunk, as large as all that were needed.
class Arena {
 public:
  struct Mark {
    std::size_t chunk;
    std::int64_t used;
  };

  // Memory for `count` values, aligned for every kernel, with nothing in it.
  template <typename T>
  T* take(std::int64_t count) {
    constexpr auto kAlignment = static_cast<std::int64_t>(kScratchAlignmentBytes);
    const std::int64_t size = count * static_cast<std::int64_t>(sizeof(T));
    const std::int64_t bytes = (size + kAlignment - 1) / kAlignment * kAlignment;
    while (at_.chunk < chunks_.size() && at_.used + bytes > chunks_[at_.chunk].bytes) at_ = {at_.chunk + 1, 0};
    if (at_.chunk == chunks_.size()) chunks_.push_back({allocate_aligned(bytes), bytes});
    T* const taken = reinterpret_cast<T*>(chunks_[at_.chunk].memory.get() + at_.used);
    at_.used += bytes;
    return taken;
  }

  Mark mark() const { return at_; }
  // Gives back what was taken since the mark.
  void release(Mark mark) { at_ = mark; }

  // Gives back everything, and makes one chunk of many.
  void clear() {
    const std::int64_t all = bytes();
    if (chunks_.size() > 1) {
      chunks_.clear();
      chunks_.push_back({allocate_aligned(all), all});
    }
    at_ = {0, 0};
  }

  std::int64_t bytes() const {
    std::int64_t all = 0;
    for (const Chunk& chunk : chunks_) all += chunk.bytes;
    return all;
  }

 private:
  struct Chunk {
    Memory memory;
    std::int64_t bytes;
  };

  std::vector<Chunk> chunks_;
  Mark at_ = {0, 0};
};

}  // namespace moss

#endif  // MOSS_NATIVE_ARENA_H_
