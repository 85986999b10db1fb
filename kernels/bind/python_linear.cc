// SPDX-License-Identifier: Apache-2.0
//
// What treats each token by itself, as functions of NumPy arrays: RMSNorm, the quantized input, the linear layer and
// its packed weights. bf16 scales are given as their bits, uint16. Shapes and formulas: ../rms_norm/rms_norm.h,
// ../quantize/quantize.h, ../linear/linear.h, ../linear/layout.h.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <iterator>
#include <string>
#include <type_traits>
#include <vector>

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

void quantize_int8_block(const Input& x, const Output& codes, const Output& scales, const Output& sums,
                         std::int64_t block, const MaybeName& kernel_name) {
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
  args.sums = checked<std::int32_t>(sums, "sums", {M, blocks});
  const QuantizeKernel& kernel = find_kernel(quantize_kernels(), kernel_name);

  nb::gil_scoped_release release;
  kernel.run(args);
}

const LinearLayout& layout_named(const std::string& name) {
  std::string names;
  for (const LinearLayout* layout : kLinearLayouts) {
    if (name == layout->name) return *layout;
    names += (names.empty() ? "" : ", ") + std::string(layout->name);
  }
  raise_value_error("layout: '" + name + "' is not one of " + names);
}

std::int64_t bytes_of_packed(const std::string& layout, const std::string& format_name, std::int64_t outputs,
                             std::int64_t columns) {
  check_count("outputs", outputs);
  check_count("columns", columns);
  return packed_bytes(layout_named(layout), weight_format(weight_named(format_name)), outputs, columns);
}

void pack(const std::string& layout_name, const std::string& format_name, const Input& codes, const Input& scales,
          const Output& packed) {
  const LinearLayout& layout = layout_named(layout_name);
  const WeightFormat& format = weight_format(weight_named(format_name));
  const Shape shape = matrix_shape(codes, "codes", "[N, K]");
  const auto* const code = checked<std::int8_t>(codes, "codes", shape);
  const void* const scale = checked_scales(scales, format, shape[0], shape[1]);
  auto* const bytes = checked<std::uint8_t>(packed, "packed", {packed_bytes(layout, format, shape[0], shape[1])});
  if (pack_weight(layout, format, shape[0], shape[1], code, scale, bytes)) return;
  raise_value_error("codes: must lie in " + std::to_string(format.code_min) + " .. " + std::to_string(format.code_max) +
                    " for " + format_name);
}

void unpack(const std::string& layout_name, const std::string& format_name, const Input& packed, const Output& codes,
            const Output& scales) {
  const LinearLayout& layout = layout_named(layout_name);
  const WeightFormat& format = weight_format(weight_named(format_name));
  const Shape shape = matrix_shape(codes, "codes", "[N, K]");
  auto* const code = checked<std::int8_t>(codes, "codes", shape);
  void* const scale = checked_scales(scales, format, shape[0], shape[1]);
  const auto* const bytes = checked<std::uint8_t>(packed, "packed", {packed_bytes(layout, format, shape[0], shape[1])});
  unpack_weight(layout, format, shape[0], shape[1], bytes, code, scale);
}

void row_of_packed(const std::string& layout_name, const std::string& format_name, const Input& packed,
                   std::int64_t outputs, std::int64_t row, const Output& values) {
  const LinearLayout& layout = layout_named(layout_name);
  const WeightFormat& format = weight_format(weight_named(format_name));
  const Shape shape = shape_of(values, "values", 1, "[K]");
  check_count("outputs", outputs);
  check_count("values: columns", shape[0]);
  const auto* const bytes = checked<std::uint8_t>(packed, "packed", {packed_bytes(layout, format, outputs, shape[0])});
  if (row < 0 || row >= outputs) raise_value_error("row: must be 0 .. outputs - 1, is " + std::to_string(row));
  packed_row(layout, format, shape[0], bytes, row, checked<float>(values, "values", shape));
}

LinearInput input_named(const std::string& name) {
  for (const LinearInput input : {LinearInput::f32, LinearInput::int8_block}) {
    if (name == kLinearInputs[static_cast<int>(input)]) return input;
  }
  raise_value_error("lhs: '" + name + "' is not one of f32, int8_block");
}

std::string linear_layout(const std::string& input, const std::string& format_name, const MaybeName& kernel_name) {
  return find_kernel(linear_kernels(input_named(input), weight_named(format_name)), kernel_name).layout->name;
}

// Fills in what both kinds of input share, and runs.
void run_linear(LinearArgs args, LinearInput input, WeightName weight, const Input& packed, const MaybeInput& bias,
                const Output& y, std::int64_t threads, const MaybeName& kernel_name) {
  const std::int64_t M = args.shape.rows, N = shape_of(y, "y", 2, "[M, N]")[1];
  const LinearKernel& kernel = find_kernel(linear_kernels(input, weight), kernel_name);
  args.shape.outputs = N;
  args.weight = checked<std::uint8_t>(
      packed, "packed", {packed_bytes(*kernel.layout, weight_format(weight), N, args.shape.columns)});
  args.bias = checked<float>(bias, "bias", {N});
  args.y = checked<float>(y, "y", {M, N});

  nb::gil_scoped_release release;
  run_units<float>(1, N, threads, 0, [&](std::int64_t, std::int64_t tile, float*) {
    kernel.run(args, tile_begin(tile), tile_end(tile, N));
  });
}

void linear_f32(const std::string& format_name, const Input& x, const Input& packed, const MaybeInput& bias,
                const Output& y, std::int64_t threads, const MaybeName& kernel_name) {
  const Shape shape = matrix_shape(x, "x", "[M, K]");
  LinearArgs args = {};
  args.shape = {shape[0], shape[1], 0};
  args.x = checked<float>(x, "x", shape);
  run_linear(args, LinearInput::f32, weight_named(format_name), packed, bias, y, threads, kernel_name);
}

void linear_int8_block(const std::string& format_name, const Input& x_codes, const Input& x_scales, const Input& x_sums,
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
  args.x_sums = checked<std::int32_t>(x_sums, "x_sums", {shape[0], shape[1] / block});
  run_linear(args, LinearInput::int8_block, weight, packed, bias, y, threads, kernel_name);
}

// Quantizes x into memory of its own, and goes on as linear_int8_block.
void quantized_linear(const std::string& format_name, const Input& x, const Input& packed, const MaybeInput& bias,
                      const Output& y, std::int64_t threads) {
  const WeightName weight = weight_named(format_name);
  const WeightFormat& format = weight_format(weight);
  const Shape shape = matrix_shape(x, "x", "[M, K]");
  const std::int64_t M = shape[0], K = shape[1], blocks = block_count(format, K);
  std::vector<std::int8_t> codes(static_cast<std::size_t>(M * blocks * format.block));
  std::vector<float> scales(static_cast<std::size_t>(M * blocks));
  std::vector<std::int32_t> sums(scales.size());
  const QuantizeArgs quantize = {M,           K, format.block, checked<float>(x, "x", shape), codes.data(),
                                 scales.data(), sums.data()};
  select(quantize_kernels(), detect_cpu_flags()).run(quantize);
  LinearArgs args = {};
  args.shape = {M, K, 0};
  args.x_codes = codes.data();
  args.x_scales = scales.data();
  args.x_sums = sums.data();
  run_linear(args, LinearInput::int8_block, weight, packed, bias, y, threads, std::nullopt);
}

}  // namespace

void bind_linear(nb::module_& module) {
  using namespace nb::literals;
  module.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "eps"_a, "y"_a, nb::kw_only(), "kernel"_a.none());
  module.def("quantize_int8_block", &quantize_int8_block, "x"_a, "codes"_a, "scales"_a, "sums"_a, nb::kw_only(),
             "block"_a, "kernel"_a.none());
  module.def("packed_bytes", &bytes_of_packed, "layout"_a, "weight_format"_a, "outputs"_a, "columns"_a);
  module.def("pack", &pack, "layout"_a, "weight_format"_a, "codes"_a, "scales"_a, "packed"_a);
  module.def("unpack", &unpack, "layout"_a, "weight_format"_a, "packed"_a, "codes"_a, "scales"_a);
  module.def("packed_row", &row_of_packed, "layout"_a, "weight_format"_a, "packed"_a, "outputs"_a, "row"_a, "values"_a);
  module.def("linear_layout", &linear_layout, "lhs"_a, "weight_format"_a, "kernel"_a.none());
  module.def("linear_f32", &linear_f32, "weight_format"_a, "x"_a, "packed"_a, "bias"_a.none(), "y"_a, nb::kw_only(),
             "threads"_a, "kernel"_a.none());
  module.def("quantized_linear", &quantized_linear, "weight_format"_a, "x"_a, "packed"_a, "bias"_a.none(), "y"_a,
             nb::kw_only(), "threads"_a);
  module.def("linear_int8_block", &linear_int8_block, "weight_format"_a, "x_codes"_a, "x_scales"_a, "x_sums"_a,
             "packed"_a, "bias"_a.none(), "y"_a, nb::kw_only(), "threads"_a, "kernel"_a.none());
}

}  // namespace moss
