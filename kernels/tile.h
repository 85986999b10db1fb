// SPDX-License-Identifier: Apache-2.0
//
// The unit of work of the kernels that run over time: one sequence of the batch and one tile of neighbouring channels.
//
// Units share no output, so the caller may run them in any order and on any threads. What is summed over units (a
// weight's gradient over the batch, say) is written as parts, one slot a unit, and summed afterwards in a fixed order.
// The tile does not depend on the number of threads; so neither do the results, to the bit.

#ifndef MOSS_KERNELS_TILE_H_
#define MOSS_KERNELS_TILE_H_

#include <cstddef>
#include <cstdint>

namespace moss {

inline constexpr std::int64_t kTile = 64;      // channels in a unit of work
inline constexpr std::int64_t kChunk = 32;     // steps of time that are held in scratch at once
inline constexpr std::int64_t kMaxLanes = 16;  // of the widest vector
inline constexpr std::size_t kScratchAlignmentBytes = 64;

// `static`: files compiled for different instruction sets must not share the code of one.
static constexpr std::int64_t tile_count(std::int64_t channels) { return (channels + kTile - 1) / kTile; }
static constexpr std::int64_t chunk_count(std::int64_t time) { return (time + kChunk - 1) / kChunk; }

static constexpr std::int64_t tile_begin(std::int64_t tile) { return tile * kTile; }
static constexpr std::int64_t tile_end(std::int64_t tile, std::int64_t channels) {
  return (tile + 1) * kTile < channels ? (tile + 1) * kTile : channels;
}
// Steps in the chunk that begins at t0.
static constexpr std::int64_t chunk_steps(std::int64_t t0, std::int64_t time) {
  return time - t0 < kChunk ? time - t0 : kChunk;
}

// sum[i] = parts[0][i] + parts[1][i] + ... for `size` elements of `count` parts that lie one after the other.
void sum_parts(const float* parts, std::int64_t count, std::int64_t size, float* sum);
void sum_parts(const double* parts, std::int64_t count, std::int64_t size, double* sum);

}  // namespace moss

#endif  // MOSS_KERNELS_TILE_H_
