// SPDX-License-Identifier: Apache-2.0
//
// What the CPU can do, as a set of flags, and the one rule of dispatch.
//
// Every operation has a list of kernels, best first, each with the flag it needs (`kernels.inc` in the operation's
// folder). `select` returns the first whose flag is in a given set. It is a pure function of the list and the flags, so
// that the choice on any machine can be tested on any other with invented flags. The last kernel of every list needs
// nothing, so there is always one.

#ifndef MOSS_KERNELS_CPU_H_
#define MOSS_KERNELS_CPU_H_

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace moss {

using CpuFlags = std::uint32_t;

// One bit a feature set that some kernel is compiled for.
enum CpuFlag : CpuFlags {
  kBaseline = 0,      // what the compiler assumes without being asked
  kAvx2 = 1u << 0,    // AVX2, FMA and F16C
  kAvx512 = 1u << 1,  // AVX-512F and FMA
  kAvx512Vnni = 1u << 2,  // AVX-512F, BW, VL and VNNI, and FMA
  kDotprod = 1u << 3,  // Arm: sdot
  kI8mm = 1u << 4,     // Arm: smmla, and sdot
};

struct CpuFlagName {
  CpuFlag flag;
  const char* name;
};

inline constexpr CpuFlagName kCpuFlagNames[] = {
    {kBaseline, "baseline"},
    {kAvx2, "avx2"},
    {kAvx512, "avx512"},
    {kAvx512Vnni, "avx512vnni"},
    {kDotprod, "dotprod"},
    {kI8mm, "i8mm"},
};

// The flags of the machine this runs on (the operating system's consent to wide registers included).
CpuFlags detect_cpu_flags();

// The kernels of one operation and type, best first.
template <typename Kernel>
struct KernelList {
  const Kernel* const* kernels;
  std::size_t count;

  const Kernel* const* begin() const { return kernels; }
  const Kernel* const* end() const { return kernels + count; }
};

// A list in the making: an operation's source adds every line of its `kernels.inc`; those of another type are left out.
template <typename Kernel>
struct KernelTable {
  const Kernel* kernels[8] = {};
  std::size_t count = 0;

  template <typename Other>
  constexpr void add(const Other& kernel) {
    if constexpr (std::is_same_v<Kernel, Other>) kernels[count++] = &kernel;
  }

  constexpr KernelList<Kernel> list() const { return {kernels, count}; }
};

template <typename Kernel>
bool can_run(const Kernel& kernel, CpuFlags flags) {
  return (kernel.flag & flags) == kernel.flag;
}

// The first kernel whose flag is among `flags`. There is one: the last of every list needs none.
template <typename Kernel>
const Kernel& select(const KernelList<Kernel>& list, CpuFlags flags) {
  for (const Kernel* kernel : list) {
    if (can_run(*kernel, flags)) return *kernel;
  }
  return *list.kernels[list.count - 1];
}

}  // namespace moss

#endif  // MOSS_KERNELS_CPU_H_
