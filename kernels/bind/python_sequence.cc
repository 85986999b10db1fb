// SPDX-License-Identifier: Apache-2.0
//
// The scan and the convolution, which run over time, as functions of NumPy arrays. Shapes and formulas:
// ../scan/scan.h, ../conv/conv.h.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <memory>

#include "../conv/conv.h"
#include "../scan/scan.h"
#include "../tile.h"
#include "arrays.h"
#include "python.h"

namespace nb = nanobind;

namespace moss {
namespace {

ScanShape scan_shape(const Input& x, const Input& A) {
  const Shape sequence = shape_of(x, "x", 3, "[B, T, E]"), rates = shape_of(A, "A", 2, "[E, N]");
  return {sequence[0], sequence[1], sequence[2], rates[1]};
}

void scan_forward(const Input& x, const Input& dt, const Input& A, const Input& Bm, const Input& Cm, const Input& D,
                  const MaybeInput& h0, const Output& y, const Output& hT, const MaybeOutput& checkpoints,
                  std::int64_t threads, const MaybeName& kernel_name) {
  with_type(x, [&](auto zero) {
    using Real = decltype(zero);
    const ScanShape shape = scan_shape(x, A);
    const std::int64_t B = shape.batch, T = shape.time, E = shape.channels, N = shape.states;
    ScanForward<Real> args;
    args.shape = shape;
    args.x = checked<Real>(x, "x", {B, T, E});
    args.dt = checked<Real>(dt, "dt", {B, T, E});
    args.A = checked<Real>(A, "A", {E, N});
    args.Bm = checked<Real>(Bm, "Bm", {B, T, N});
    args.Cm = checked<Real>(Cm, "Cm", {B, T, N});
    args.D = checked<Real>(D, "D", {E});
    args.h0 = checked<Real>(h0, "h0", {B, E, N});
    args.y = checked<Real>(y, "y", {B, T, E});
    args.hT = checked<Real>(hT, "hT", {B, E, N});
    args.checkpoints = checked<Real>(checkpoints, "checkpoints", {B, chunk_count(T), N, E});
    const ScanKernel<Real>& kernel = find_kernel(scan_kernels<Real>(), kernel_name);

    nb::gil_scoped_release release;
    run_units<Real>(B, E, threads, scan_scratch_size(N), [&](std::int64_t b, std::int64_t tile, Real* scratch) {
      kernel.forward(args, b, tile, scratch);
    });
  });
}

void scan_backward(const Input& x, const Input& dt, const Input& A, const Input& Bm, const Input& Cm, const Input& D,
                   const Input& checkpoints, const Input& dy, const MaybeInput& dhT, const Output& dx,
                   const Output& ddt, const Output& dA, const Output& dBm, const Output& dCm, const Output& dD,
                   const Output& dh0, std::int64_t threads, const MaybeName& kernel_name) {
  with_type(x, [&](auto zero) {
    using Real = decltype(zero);
    const ScanShape shape = scan_shape(x, A);
    const std::int64_t B = shape.batch, T = shape.time, E = shape.channels, N = shape.states;
    ScanBackward<Real> args;
    args.shape = shape;
    args.x = checked<Real>(x, "x", {B, T, E});
    args.dt = checked<Real>(dt, "dt", {B, T, E});
    args.A = checked<Real>(A, "A", {E, N});
    args.Bm = checked<Real>(Bm, "Bm", {B, T, N});
    args.Cm = checked<Real>(Cm, "Cm", {B, T, N});
    args.D = checked<Real>(D, "D", {E});
    args.checkpoints = checked<Real>(checkpoints, "checkpoints", {B, chunk_count(T), N, E});
    args.dy = checked<Real>(dy, "dy", {B, T, E});
    args.dhT = checked<Real>(dhT, "dhT", {B, E, N});
    args.dx = checked<Real>(dx, "dx", {B, T, E});
    args.ddt = checked<Real>(ddt, "ddt", {B, T, E});
    args.dh0 = checked<Real>(dh0, "dh0", {B, E, N});
    Real* const dA_sum = checked<Real>(dA, "dA", {E, N});
    Real* const dBm_sum = checked<Real>(dBm, "dBm", {B, T, N});
    Real* const dCm_sum = checked<Real>(dCm, "dCm", {B, T, N});
    Real* const dD_sum = checked<Real>(dD, "dD", {E});
    const ScanKernel<Real>& kernel = find_kernel(scan_kernels<Real>(), kernel_name);

    nb::gil_scoped_release release;
    const std::int64_t tiles = tile_count(E), steps = B * T * N;
    const std::unique_ptr<Real[]> parts(new Real[static_cast<std::size_t>(2 * tiles * steps + B * E * (N + 1))]);
    args.dBm_parts = parts.get();
    args.dCm_parts = args.dBm_parts + tiles * steps;
    args.dA_parts = args.dCm_parts + tiles * steps;
    args.dD_parts = args.dA_parts + B * E * N;
    run_units<Real>(B, E, threads, scan_scratch_size(N), [&](std::int64_t b, std::int64_t tile, Real* scratch) {
      kernel.backward(args, b, tile, scratch);
    });
    sum_parts(args.dBm_parts, tiles, steps, dBm_sum);
    sum_parts(args.dCm_parts, tiles, steps, dCm_sum);
    sum_parts(args.dA_parts, B, E * N, dA_sum);
    sum_parts(args.dD_parts, B, E, dD_sum);
  });
}

ConvShape conv_shape(const Input& x, const Input& weight) {
  const Shape sequence = shape_of(x, "x", 3, "[B, T, E]"), taps = shape_of(weight, "weight", 2, "[E, W]");
  if (taps[1] < 1) raise_value_error("weight: the width W is 0, must be at least 1");
  return {sequence[0], sequence[1], sequence[2], taps[1]};
}

void conv_forward(const Input& x, const Input& weight, const Input& bias, const MaybeInput& window, const Output& y,
                  const Output& new_window, std::int64_t threads, const MaybeName& kernel_name) {
  with_type(x, [&](auto zero) {
    using Real = decltype(zero);
    const ConvShape shape = conv_shape(x, weight);
    const std::int64_t B = shape.batch, T = shape.time, E = shape.channels, W = shape.width;
    ConvForward<Real> args;
    args.shape = shape;
    args.x = checked<Real>(x, "x", {B, T, E});
    args.weight = checked<Real>(weight, "weight", {E, W});
    args.bias = checked<Real>(bias, "bias", {E});
    args.window = checked<Real>(window, "window", {B, E, W - 1});
    args.y = checked<Real>(y, "y", {B, T, E});
    args.new_window = checked<Real>(new_window, "new_window", {B, E, W - 1});
    const ConvKernel<Real>& kernel = find_kernel(conv_kernels<Real>(), kernel_name);

    nb::gil_scoped_release release;
    run_units<Real>(B, E, threads, conv_scratch_size(W), [&](std::int64_t b, std::int64_t tile, Real* scratch) {
      kernel.forward(args, b, tile, scratch);
    });
  });
}

void conv_backward(const Input& x, const Input& weight, const Input& bias, const MaybeInput& window, const Input& dy,
                   const MaybeInput& dnew_window, const Output& dx, const Output& dweight, const Output& dbias,
                   const Output& dwindow, std::int64_t threads, const MaybeName& kernel_name) {
  with_type(x, [&](auto zero) {
    using Real = decltype(zero);
    const ConvShape shape = conv_shape(x, weight);
    const std::int64_t B = shape.batch, T = shape.time, E = shape.channels, W = shape.width;
    ConvBackward<Real> args;
    args.shape = shape;
    args.x = checked<Real>(x, "x", {B, T, E});
    args.weight = checked<Real>(weight, "weight", {E, W});
    args.bias = checked<Real>(bias, "bias", {E});
    args.window = checked<Real>(window, "window", {B, E, W - 1});
    args.dy = checked<Real>(dy, "dy", {B, T, E});
    args.dnew_window = checked<Real>(dnew_window, "dnew_window", {B, E, W - 1});
    args.dx = checked<Real>(dx, "dx", {B, T, E});
    args.dwindow = checked<Real>(dwindow, "dwindow", {B, E, W - 1});
    Real* const dweight_sum = checked<Real>(dweight, "dweight", {E, W});
    Real* const dbias_sum = checked<Real>(dbias, "dbias", {E});
    const ConvKernel<Real>& kernel = find_kernel(conv_kernels<Real>(), kernel_name);

    nb::gil_scoped_release release;
    const std::unique_ptr<Real[]> parts(new Real[static_cast<std::size_t>(B * E * (W + 1))]);
    args.dweight_parts = parts.get();
    args.dbias_parts = args.dweight_parts + B * E * W;
    run_units<Real>(B, E, threads, conv_scratch_size(W), [&](std::int64_t b, std::int64_t tile, Real* scratch) {
      kernel.backward(args, b, tile, scratch);
    });
    sum_parts(args.dweight_parts, B, E * W, dweight_sum);
    sum_parts(args.dbias_parts, B, E, dbias_sum);
  });
}

}  // namespace

void bind_sequence(nb::module_& module) {
  using namespace nb::literals;
  module.attr("CHUNK") = kChunk;
  module.def("scan_forward", &scan_forward, "x"_a, "dt"_a, "A"_a, "Bm"_a, "Cm"_a, "D"_a, "h0"_a.none(), "y"_a,
             "hT"_a, "checkpoints"_a.none(), nb::kw_only(), "threads"_a, "kernel"_a.none());
  module.def("scan_backward", &scan_backward, "x"_a, "dt"_a, "A"_a, "Bm"_a, "Cm"_a, "D"_a, "checkpoints"_a,
             "dy"_a, "dhT"_a.none(), "dx"_a, "ddt"_a, "dA"_a, "dBm"_a, "dCm"_a, "dD"_a, "dh0"_a, nb::kw_only(),
             "threads"_a, "kernel"_a.none());
  module.def("conv_forward", &conv_forward, "x"_a, "weight"_a, "bias"_a, "window"_a.none(), "y"_a,
             "new_window"_a, nb::kw_only(), "threads"_a, "kernel"_a.none());
  module.def("conv_backward", &conv_backward, "x"_a, "weight"_a, "bias"_a, "window"_a.none(), "dy"_a,
             "dnew_window"_a.none(), "dx"_a, "dweight"_a, "dbias"_a, "dwindow"_a, nb::kw_only(), "threads"_a,
             "kernel"_a.none());
}

}  // namespace moss
