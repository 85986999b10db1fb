// SPDX-License-Identifier: Apache-2.0
//
// The parts of the Python module: each adds its functions.

#ifndef MOSS_KERNELS_BIND_PYTHON_H_
#define MOSS_KERNELS_BIND_PYTHON_H_

#include <nanobind/nanobind.h>

namespace moss {

void bind_sequence(nanobind::module_& module);
void bind_linear(nanobind::module_& module);
void bind_memory(nanobind::module_& module);

}  // namespace moss

#endif  // MOSS_KERNELS_BIND_PYTHON_H_
