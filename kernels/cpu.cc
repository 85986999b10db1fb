// SPDX-License-Identifier: Apache-2.0

#include "cpu.h"

namespace moss {

CpuFlags detect_cpu_flags() {
  CpuFlags flags = kBaseline;
#if defined(MOSS_X86_KERNELS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) flags |= kAvx2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma")) flags |= kAvx512;
#endif
  return flags;
}

}  // namespace moss
