// SPDX-License-Identifier: Apache-2.0
//
// The order in which a form on strips goes through rows and outputs, a template on what it does with one strip.
//
// `Strip` is one instruction set's: layout, format, kMostRows, kMostStrips, and run<R>(args, m, n, count, strip), which
// computes rows m .. m + R - 1 of outputs n .. n + count - 1, those of one strip, for R = kMostRows and the numbers of
// rows below it that `fewer` gives; where kMostStrips is more than 1, run<1, T> too, those of T neighbouring strips,
// for kMostStrips and its halves. It lives in an unnamed namespace of its file, so that no code compiled for one
// instruction set can be linked into another.

#ifndef MOSS_KERNELS_LINEAR_STRIPS_H_
#define MOSS_KERNELS_LINEAR_STRIPS_H_

#include <cstdint>

#include "linear.h"

namespace moss {

inline constexpr std::int64_t kResidentBytes = 1 << 19;  // of input codes, which stay in the second cache
inline constexpr std::int64_t kStripsTogether = 4;       // that rows meet before the next rows come

// 12, and 8 to 1.
static constexpr int fewer(int rows) { return rows == 12 ? 8 : rows - 1; }

// Brings the outputs of R rows near before they are computed: a store that crosses from a line to another waits for
// both, and where rows are far apart in memory the processor expects neither.
template <int R>
static void fetch_outputs(const LinearArgs& args, std::int64_t m, std::int64_t n, std::int64_t count) {
  for (int r = 0; r < R; ++r) {
    const float* const y = args.y + (m + r) * args.shape.outputs + n;
    __builtin_prefetch(y);
    __builtin_prefetch(y + count - 1);
  }
}

// Outputs n .. end - 1 of R rows; of one row, T strips together.
template <typename Strip, int R, int T = R == 1 ? Strip::kMostStrips : 1>
void run_outputs(const LinearArgs& args, std::int64_t m, std::int64_t n, std::int64_t end) {
  constexpr std::int64_t S = Strip::layout.strip;
  const std::int64_t bytes = strip_bytes(Strip::layout, Strip::format, args.shape.columns);
  for (; T == 1 ? n < end : end - n >= T * S; n += T * S) {
    const std::int64_t count = end - n < T * S ? end - n : T * S;
    const std::uint8_t* const strip = args.weight + n / S * bytes;
    fetch_outputs<R>(args, m, n, count);
    if constexpr (T == 1) {
      Strip::template run<R>(args, m, n, count, strip);
    } else {
      Strip::template run<R, T>(args, m, n, count, strip);
    }
  }
  if constexpr (T > 1) run_outputs<Strip, R, T / 2>(args, m, n, end);
}

// Outputs n .. end - 1 of as many of rows m .. last - 1 as go through a strip together; returns how many.
template <typename Strip, int R = Strip::kMostRows>
std::int64_t run_some(const LinearArgs& args, std::int64_t m, std::int64_t last, std::int64_t n, std::int64_t end) {
  if constexpr (R > 1) {
    if (last - m < R) return run_some<Strip, fewer(R)>(args, m, last, n, end);
  }
  run_outputs<Strip, R>(args, m, n, end);
  return R;
}

// One unit of work: some strips meet all rows that fit the cache, then the next strips; then come the next rows.
template <typename Strip>
void run_strips(const LinearArgs& args, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t most = Strip::kMostRows, together = kStripsTogether * Strip::layout.strip;
  const std::int64_t M = args.shape.rows, K = args.shape.columns;
  const std::int64_t groups = kResidentBytes / (block_count(Strip::format, K) * Strip::format.block * most);
  const std::int64_t resident = (groups > 0 ? groups : 1) * most;
  for (std::int64_t first = 0; first < M; first += resident) {
    const std::int64_t last = first + resident < M ? first + resident : M;
    for (std::int64_t n = begin; n < end; n += together) {
      const std::int64_t n_end = n + together < end ? n + together : end;
      for (std::int64_t m = first; m < last;) m += run_some<Strip>(args, m, last, n, n_end);
    }
  }
}

}  // namespace moss

#endif  // MOSS_KERNELS_LINEAR_STRIPS_H_
