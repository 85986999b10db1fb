// SPDX-License-Identifier: Apache-2.0
//
// The Python module: which kernels there are and which one is chosen, and the kernels as functions of NumPy arrays,
// which are checks, threads and nothing else. Every array is given by the caller, outputs included; a wrong type, shape
// or layout raises ValueError naming the argument. The GIL is released while kernels run.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

#include "../conv/conv.h"
#include "../cpu.h"
#include "../dense/dense.h"
#include "../linear/linear.h"
#include "../mixer/mixer.h"
#include "../quantize/quantize.h"
#include "../rms_norm/rms_norm.h"
#include "../scan/scan.h"
#include "../swiglu/swiglu.h"
#include "arrays.h"
#include "python.h"

namespace nb = nanobind;

namespace moss {
namespace {

CpuFlags flags_from_names(const std::vector<std::string>& names) {
  CpuFlags flags = kBaseline;
  for (const std::string& name : names) {
    const auto* found = std::find_if(std::begin(kCpuFlagNames), std::end(kCpuFlagNames),
                                     [&](const CpuFlagName& known) { return name == known.name; });
    if (found == std::end(kCpuFlagNames)) raise_value_error("flags: '" + name + "' is not known");
    flags |= found->flag;
  }
  return flags;
}

std::vector<std::string> names_from_flags(CpuFlags flags) {
  std::vector<std::string> names;
  for (const CpuFlagName& known : kCpuFlagNames) {
    if (known.flag & flags) names.push_back(known.name);
  }
  return names;
}

// visit(list) with the kernels of one operation on some numbers, the middle part of their names.
template <typename Visit>
auto with_list(const std::string& op, const std::string& numbers, const Visit& visit) {
  if (op == "scan" && numbers == "f32") return visit(scan_kernels<float>());
  if (op == "scan" && numbers == "f64") return visit(scan_kernels<double>());
  if (op == "conv" && numbers == "f32") return visit(conv_kernels<float>());
  if (op == "conv" && numbers == "f64") return visit(conv_kernels<double>());
  if (op == "rms_norm" && numbers == "f32") return visit(rms_norm_kernels<float>());
  if (op == "rms_norm" && numbers == "f64") return visit(rms_norm_kernels<double>());
  if (op == "quantize" && numbers == "int8_block_f32") return visit(quantize_kernels());
  if (op == "mixer" && numbers == "f32") return visit(mixer_kernels());
  if (op == "swiglu" && numbers == "f32") return visit(swiglu_kernels());
  if (op == "dense" && numbers == "f32") return visit(dense_kernels());
  if (op == "linear") {
    for (const LinearInput input : {LinearInput::f32, LinearInput::int8_block}) {
      for (int weight = 0; weight < static_cast<int>(std::size(kWeightFormats)); ++weight) {
        const std::string own = std::string("f32_") + kLinearInputs[static_cast<int>(input)] + "_";
        if (numbers == own + kWeightFormats[weight].name) {
          return visit(linear_kernels(input, static_cast<WeightName>(weight)));
        }
      }
    }
  }
  raise_value_error("there are no kernels for operation '" + op + "' on numbers '" + numbers + "'");
}

std::vector<std::string> kernel_names(const std::string& op, const std::string& numbers,
                                      const std::vector<std::string>& flags) {
  const CpuFlags given = flags_from_names(flags);
  return with_list(op, numbers, [&](const auto& list) {
    std::vector<std::string> names;
    for (const auto* kernel : list) {
      if (can_run(*kernel, given)) names.push_back(kernel->name);
    }
    return names;
  });
}

std::string selected(const std::string& op, const std::string& numbers, const std::vector<std::string>& flags) {
  const CpuFlags given = flags_from_names(flags);
  return with_list(op, numbers, [&](const auto& list) { return std::string(select(list, given).name); });
}

}  // namespace
}  // namespace moss

NB_MODULE(_native, module) {
  using namespace nb::literals;
  module.def("cpu_flags", [] { return moss::names_from_flags(moss::detect_cpu_flags()); });
  module.def("kernel_names", &moss::kernel_names, "op"_a, "numbers"_a, "flags"_a);
  module.def("selected", &moss::selected, "op"_a, "numbers"_a, "flags"_a);
  moss::bind_sequence(module);
  moss::bind_linear(module);
  moss::bind_memory(module);
}
