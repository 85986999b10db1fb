// SPDX-License-Identifier: Apache-2.0
//
// What treats each token by itself, as functions of NumPy arrays: RMSNorm, the quantized input, the linear layer and
// its packed weights. bf16 scales are given as their bits, uint16. Shapes and formulas: ../rms_norm/rms_norm.h,
// ../quantize/quantize.h, ../linear/linear.h, ../linear/packed.h.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <iterator>
#include <string>
#include <type_traits>

#include "../linear/linear.h"
#include "../quantize/quantize.h"
#include "../rms_norm/rms_norm.h"
#include "arrays.h"
#include "python.h"

namespace nb = nanobind;

namespace moss {
namespace {

// The shape of a matrix with at least one column.
template <typename Array>
Shape matrix_shape(const Array& array, const char* name, const char* letters) {
  const Shape shape = shape_of(array, name, 2, letters);
  if (shape[1] < 1) raise_value_error(std::string(name) + ": has no columns, must have at least 1");
  return shape;
}

// A count that belongs to no array, and is rounded up and multiplied.
void check_count(const char* name, std::int64_t count) {
  constexpr std::int64_t kMost = std::int64_t{1} << 40;
  if (count >= 1 && count <= kMost) return;
  raise_value_error(std::string(name) + ": must be 1 .. 2^40, is " + std::to_string(count));
}

WeightName weight_named(const std::string& name) {
  std::string names;
  for (int i = 0; i < static_cast<int>(std::size(kWeightFormats)); ++i) {
    if (name == kWeightFormats[i].name) return static_cast<WeightName>(i);
    names += (i ? ", " : "") + std::string(kWeightFormats[i].name);
  }
  raise_value_error("weight_format: '" + name + "' is not one of " + names);
}

// The address of scales [N, scale_count] of either type.
template <typename Array>
auto checked_scales(const Array& scales, const WeightFormat& format, std::int64_t outputs, std::int64_t columns) {
  using Address = std::conditional_t<std::is_same_v<Array, Input>, const void*, void*>;
  const Shape shape = {outputs, scale_count(format, columns)};
  if (format.row_scale) return Address(checked<float>(scales, "scales", shape));
  return Address(checked<std::uint16_t>(scales, "scales", shape));
}

void rms_norm(const Input& x, const Input& weight, double eps, const Output& y, const MaybeName& kernel_name) {
  const Shape shape = matrix_shape(x, "x", "[M, D]");
  with_type(x, [&](auto zero) {
    using Real = decltype(zero);
    RmsNormArgs<Real> args;
    args.rows = shape[0];
    args.columns = shape[1];
    args.x = checked<Real>(x, "x", shape);
    args.weight = checked<Real>(weight, "weight", {shape[1]});
    args.eps = static_cast<Real>(eps);
    if (!(args.eps > 0)) raise_value_error("eps: must be positive");
    args.y = checked<Real>(y, "y", shape);
    const RmsNormKernel<Real>& kernel = find_kernel(rms_norm_kernels<Real>(), kernel_name);

    nb::gil_scoped_release release;
    kernel.run(args);
  });
}

void quantize_int8_block(const Input& x, const Output& codes, const Output& scales, std::int64_t block,
                         const MaybeName& kernel_name) {
  const Shape shape = matrix_shape(x, "x", "[M, K]");
  check_count("block", block);
  const std::int64_t M = shape[0], K = shape[1], blocks = (K + block - 1) / block;
  QuantizeArgs args;
  args.rows = M;
  args.columns = K;
  args.block = block;
  args.x = checked<float>(x, "x", shape);
  args.codes = checked<std::int8_t>(codes, "codes", {M, blocks * block});
  args.scales = checked<float>(scales, "scales", {M, blocks});
  const QuantizeKernel& kernel = find_kernel(quantize_kernels(), kernel_name);

  nb::gil_scoped_release release;
  kernel.run(args);
}

std::int64_t packed_row_bytes(const std::string& format_name, std::int64_t columns) {
  check_count("columns", columns);
  return row_bytes(weight_format(weight_named(format_name)), columns);
}

void pack(const std::string& format_name, const Input& codes, const Input& scales, const Output& packed) {
  const WeightFormat& format = weight_format(weight_named(format_name));
  const Shape shape = matrix_shape(codes, "codes", "[N, K]");
  const auto* const code = checked<std::int8_t>(codes, "codes", shape);
  const void* const scale = checked_scales(scales, format, shape[0], shape[1]);
  auto* const bytes = checked<std::uint8_t>(packed, "packed", {shape[0], row_bytes(format, shape[1])});
  if (pack_weight(format, shape[0], shape[1], code, scale, bytes)) return;
  raise_value_error("codes: must lie in " + std::to_string(format.code_min) + " .. " + std::to_string(format.code_max) +
                    " for " + format_name);
}

void unpack(const std::string& format_name, const Input& packed, const Output& codes, const Output& scales) {
  const WeightFormat& format = weight_format(weight_named(format_name));
  const Shape shape = matrix_shape(codes, "codes", "[N, K]");
  auto* const code = checked<std::int8_t>(codes, "codes", shape);
  void* const scale = checked_scales(scales, format, shape[0], shape[1]);
  const auto* const bytes = checked<std::uint8_t>(packed, "packed", {shape[0], row_bytes(format, shape[1])});
  unpack_weight(format, shape[0], shape[1], bytes, code, scale);
}

// Fills in what both kinds of input share, and runs.
void run_linear(LinearArgs args, LinearInput input, WeightName weight, const Input& packed, const MaybeInput& bias,
                const Output& y, std::int64_t threads, const MaybeName& kernel_name) {
  const std::int64_t M = args.shape.rows, N = shape_of(packed, "packed", 2, "[N, row_bytes]")[0];
  args.shape.outputs = N;
  args.weight = checked<std::uint8_t>(packed, "packed", {N, row_bytes(weight_format(weight), args.shape.columns)});
  args.bias = checked<float>(bias, "bias", {N});
  args.y = checked<float>(y, "y", {M, N});
  const LinearKernel& kernel = find_kernel(linear_kernels(input, weight), kernel_name);

  nb::gil_scoped_release release;
  run_units<float>(1, N, threads, 0, [&](std::int64_t, std::int64_t tile, float*) { kernel.run(args, tile); });
}

void linear_f32(const std::string& format_name, const Input& x, const Input& packed, const MaybeInput& bias,
                const Output& y, std::int64_t threads, const MaybeName& kernel_name) {
  const Shape shape = matrix_shape(x, "x", "[M, K]");
  LinearArgs args = {};
  args.shape = {shape[0], shape[1], 0};
  args.x = checked<float>(x, "x", shape);
  run_linear(args, LinearInput::f32, weight_named(format_name), packed, bias, y, threads, kernel_name);
}

void linear_int8_block(const std::string& format_name, const Input& x_codes, const Input& x_scales,
                       const Input& packed, const MaybeInput& bias, const Output& y, std::int64_t threads,
                       const MaybeName& kernel_name) {
  const WeightName weight = weight_named(format_name);
  const std::int64_t block = weight_format(weight).block;
  const Shape shape = matrix_shape(x_codes, "x_codes", "[M, C]");
  if (shape[1] % block != 0) {
    raise_value_error("x_codes: has " + std::to_string(shape[1]) + " columns, must have whole blocks of " +
                      std::to_string(block) + " for " + format_name);
  }
  LinearArgs args = {};
  args.shape = {shape[0], shape[1], 0};
  args.x_codes = checked<std::int8_t>(x_codes, "x_codes", shape);
  args.x_scales = checked<float>(x_scales, "x_scales", {shape[0], shape[1] / block});
  run_linear(args, LinearInput::int8_block, weight, packed, bias, y, threads, kernel_name);
}

}  // namespace

void bind_linear(nb::module_& module) {
  using namespace nb::literals;
  module.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "eps"_a, "y"_a, nb::kw_only(), "kernel"_a.none());
  module.def("quantize_int8_block", &quantize_int8_block, "x"_a, "codes"_a, "scales"_a, nb::kw_only(), "block"_a,
             "kernel"_a.none());
  module.def("packed_row_bytes", &packed_row_bytes, "weight_format"_a, "columns"_a);
  module.def("pack", &pack, "weight_format"_a, "codes"_a, "scales"_a, "packed"_a);
  module.def("unpack", &unpack, "weight_format"_a, "packed"_a, "codes"_a, "scales"_a);
  module.def("linear_f32", &linear_f32, "weight_format"_a, "x"_a, "packed"_a, "bias"_a.none(), "y"_a, nb::kw_only(),
             "threads"_a, "kernel"_a.none());
  module.def("linear_int8_block", &linear_int8_block, "weight_format"_a, "x_codes"_a, "x_scales"_a, "packed"_a,
             "bias"_a.none(), "y"_a, nb::kw_only(), "threads"_a, "kernel"_a.none());
}

}  // namespace moss
