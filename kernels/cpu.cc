// SPDX-License-Identifier: Apache-2.0

#include "cpu.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace moss {

CpuFlags detect_cpu_flags() {
  CpuFlags flags = kBaseline;
#if defined(MOSS_X86_KERNELS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) flags |= kAvx2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma")) flags |= kAvx512;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma")) {
    flags |= kAvx512Vnni;
  }
#elif defined(__aarch64__) && defined(__linux__)
  // Bits of the kernel's user interface (arch/arm64/include/uapi/asm/hwcap.h), which old headers lack.
  constexpr unsigned long kHwcapDotprod = 1ul << 20, kHwcap2I8mm = 1ul << 13;
  if (getauxval(AT_HWCAP) & kHwcapDotprod) {
    flags |= kDotprod;
    if (getauxval(AT_HWCAP2) & kHwcap2I8mm) flags |= kI8mm;
  }
#endif
  return flags;
}

}  // namespace moss
