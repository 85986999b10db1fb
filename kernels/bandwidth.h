// SPDX-License-Identifier: Apache-2.0
//
// A read of memory at full speed, to measure others by.

#ifndef MOSS_KERNELS_BANDWIDTH_H_
#define MOSS_KERNELS_BANDWIDTH_H_

#include <cstddef>
#include <cstdint>

namespace moss {

// Reads every whole 256 bytes from `data` on.
void read_memory(const std::uint8_t* data, std::size_t bytes);

}  // namespace moss

#endif  // MOSS_KERNELS_BANDWIDTH_H_
