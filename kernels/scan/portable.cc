// SPDX-License-Identifier: Apache-2.0

#include "../vec/portable.h"
#include "vector.h"

namespace moss {

const ScanKernel<float> moss_scan_f32_portable = {
    kBaseline, "moss_scan_f32_portable", scan_forward<Vec4>, scan_backward<Vec4>};

}  // namespace moss
