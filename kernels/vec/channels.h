// SPDX-License-Identifier: Apache-2.0
//
// The channels of one tile in rows of scratch, and a vector's share of them: how to move them to and from memory.
//
// A row of scratch has kTile columns, one a channel; where the tile is cut short by the end of the channels, the
// columns left over hold zeros, and kernels compute on them like on any other.

#ifndef MOSS_KERNELS_VEC_CHANNELS_H_
#define MOSS_KERNELS_VEC_CHANNELS_H_

#include <cstdint>

#include "../tile.h"

namespace moss {

// A vector's channels in a row of memory: all lanes, or fewer at the end of the channels.
template <typename Vec>
struct Channels {
  std::int64_t begin;
  std::int64_t count;  // at least 1

  static Channels of(std::int64_t begin, std::int64_t end) {
    return {begin, end - begin < Vec::kLanes ? end - begin : Vec::kLanes};
  }

  // Zeros in the lanes without a channel.
  Vec load(const float* row) const {
    return count == Vec::kLanes ? Vec::load(row + begin) : Vec::load_some(row + begin, count);
  }
  void store(Vec v, float* row) const {
    if (count == Vec::kLanes) {
      v.store(row + begin);
    } else {
      v.store_some(row + begin, count);
    }
  }
};

// columns[k, c] = factor * rows[c, k] for the `channels` rows of a tile and k < width; columns is [width, kTile], its
// other columns are zeros, and all of it where rows is null.
static inline void transpose_in(const float* rows, std::int64_t channels, std::int64_t width, float factor,
                                float* columns) {
  for (std::int64_t k = 0; k < width; ++k) {
    for (std::int64_t c = 0; c < kTile; ++c) {
      columns[k * kTile + c] = rows && c < channels ? factor * rows[c * width + k] : 0.0f;
    }
  }
}

// rows[c, k] = columns[k, c] for the `channels` rows of a tile and k < width.
static inline void transpose_out(const float* columns, std::int64_t channels, std::int64_t width, float* rows) {
  for (std::int64_t c = 0; c < channels; ++c) {
    for (std::int64_t k = 0; k < width; ++k) rows[c * width + k] = columns[k * kTile + c];
  }
}

static inline void set_zero(float* values, std::int64_t size) {
  for (std::int64_t i = 0; i < size; ++i) values[i] = 0.0f;
}

}  // namespace moss

#endif  // MOSS_KERNELS_VEC_CHANNELS_H_
