// SPDX-License-Identifier: Apache-2.0
//
// How the outputs of a linear, and channels, are shared out over threads.

#ifndef MOSS_NATIVE_TILES_H_
#define MOSS_NATIVE_TILES_H_

#include <algorithm>
#include <cstdint>

namespace moss {

// A range cut into units of neighbours, each but the last a multiple of `step`.
struct Tiles {
  static constexpr std::int64_t kUnitsPerThread = 4;

  std::int64_t size;
  std::int64_t tile;

  Tiles(std::int64_t all, std::int64_t step, int threads) : size(all) {
    const std::int64_t units = threads == 1 ? 1 : threads * kUnitsPerThread;
    tile = std::max(step, ((all + units - 1) / units + step - 1) / step * step);
  }
  std::int64_t count() const { return (size + tile - 1) / tile; }
  std::int64_t begin(std::int64_t i) const { return i * tile; }
  std::int64_t end(std::int64_t i) const { return std::min(size, (i + 1) * tile); }
};

}  // namespace moss

#endif  // MOSS_NATIVE_TILES_H_
