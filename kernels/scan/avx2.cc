// SPDX-License-Identifier: Apache-2.0

#include "../vec/avx2.h"
#include "vector.h"

namespace moss {

const ScanKernel<float> moss_scan_f32_avx2 = {kAvx2, "moss_scan_f32_avx2", scan_forward<Vec8>, scan_backward<Vec8>};

}  // namespace moss
