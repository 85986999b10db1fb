// SPDX-License-Identifier: Apache-2.0

#include "../vec/avx512.h"
#include "vector.h"

namespace moss {

const ScanKernel<float> moss_scan_f32_avx512 = {
    kAvx512, "moss_scan_f32_avx512", scan_forward<Vec16>, scan_backward<Vec16>};

}  // namespace moss
