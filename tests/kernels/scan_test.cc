// SPDX-License-Identifier: Apache-2.0
//
// Every scan kernel in the list that this machine can run, against the scalar form in float64: all outputs and
// gradients, at sizes around the vector, tile and chunk. Meant for the sanitizers; the mathematics is checked in
// test_scan.py.

#include "scan/scan.h"

#include "compare.h"

namespace moss_tests {
namespace {

template <typename Real>
struct Results {
  std::vector<Real> y, hT, checkpoints, dx, ddt, dh0, dBm, dCm, dA, dD;
};

template <typename Real>
struct Inputs {
  std::vector<Real> x, dt, A, Bm, Cm, D, h0, dy, dhT;
};

// `states`: with a first state and a gradient of the last; otherwise those are null.
template <typename Real>
Results<Real> run(const moss::ScanKernel<Real>& kernel, const moss::ScanShape& shape, const Inputs<Real>& in,
                  bool states) {
  const std::int64_t B = shape.batch, T = shape.time, E = shape.channels, N = shape.states;
  const std::int64_t tiles = moss::tile_count(E);
  Results<Real> out;
  out.y = out.dx = out.ddt = unset<Real>(B * T * E);
  out.hT = out.dh0 = out.dA = unset<Real>(B * E * N);
  out.checkpoints = unset<Real>(B * moss::chunk_count(T) * N * E);
  out.dBm = out.dCm = unset<Real>(tiles * B * T * N);
  out.dD = unset<Real>(B * E);

  const moss::ScanForward<Real> forward = {
      shape,        in.x.data(),  in.dt.data(),           in.A.data(), in.Bm.data(),  in.Cm.data(),
      in.D.data(), states ? in.h0.data() : nullptr, out.y.data(), out.hT.data(), out.checkpoints.data()};
  const moss::ScanBackward<Real> backward = {shape,
                                             in.x.data(),
                                             in.dt.data(),
                                             in.A.data(),
                                             in.Bm.data(),
                                             in.Cm.data(),
                                             in.D.data(),
                                             out.checkpoints.data(),
                                             in.dy.data(),
                                             states ? in.dhT.data() : nullptr,
                                             out.dx.data(),
                                             out.ddt.data(),
                                             out.dh0.data(),
                                             out.dBm.data(),
                                             out.dCm.data(),
                                             out.dA.data(),
                                             out.dD.data()};
  for (std::int64_t b = 0; b < B; ++b) {
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      kernel.forward(forward, b, tile, Scratch<Real>(moss::scan_scratch_size(N)).data.get());
      kernel.backward(backward, b, tile, Scratch<Real>(moss::scan_scratch_size(N)).data.get());
    }
  }
  return out;
}

bool test_shape(const moss::ScanShape& shape, bool states) {
  const std::int64_t B = shape.batch, T = shape.time, E = shape.channels, N = shape.states;
  Random random(static_cast<unsigned>(1 + T + 131 * E + 7 * N));
  Inputs<float> in;
  in.x = random.normal(B * T * E);
  in.dt = random.normal(B * T * E, 2, -2);
  in.A = random.normal(E * N);
  for (float& a : in.A) a = -std::exp(a);
  in.Bm = random.normal(B * T * N);
  in.Cm = random.normal(B * T * N);
  in.D = random.normal(E);
  in.h0 = random.normal(B * E * N);
  in.dy = random.normal(B * T * E);
  in.dhT = random.normal(B * E * N);
  const Inputs<double> exact = {doubles(in.x), doubles(in.dt), doubles(in.A),  doubles(in.Bm), doubles(in.Cm),
                                doubles(in.D), doubles(in.h0), doubles(in.dy), doubles(in.dhT)};
  const auto doubles_list = moss::scan_kernels<double>();
  const Results<double> expected = run(*doubles_list.kernels[doubles_list.count - 1], shape, exact, states);

  bool passed = true;
  for (const auto* kernel : moss::scan_kernels<float>()) {
    if (!runs_here(*kernel)) continue;
    const Results<float> found = run(*kernel, shape, in, states);
    char at[160];
    std::snprintf(at, sizeof(at), "%s B %d T %d E %d N %d ", kernel->name, static_cast<int>(B), static_cast<int>(T),
                  static_cast<int>(E), static_cast<int>(N));
    const auto check = [&](const char* name, const Floats& one, const Doubles& other) {
      passed = close(std::string(at) + name, one, other) && passed;
    };
    check("y", found.y, expected.y);
    check("hT", found.hT, expected.hT);
    check("checkpoints", found.checkpoints, expected.checkpoints);
    check("dx", found.dx, expected.dx);
    check("ddt", found.ddt, expected.ddt);
    check("dh0", found.dh0, expected.dh0);
    check("dBm", found.dBm, expected.dBm);
    check("dCm", found.dCm, expected.dCm);
    check("dA", found.dA, expected.dA);
    check("dD", found.dD, expected.dD);
  }
  return passed;
}

}  // namespace

bool test_scan() {
  bool passed = true;
  for (std::int64_t B : {1, 3}) {
    for (std::int64_t T : {0, 1, 31, 32, 33, 100}) {
      for (std::int64_t E : {1, 7, 16, 33, 70}) {
        for (std::int64_t N : {0, 1, 5, 16, 17}) passed = test_shape({B, T, E, N}, B > 1) && passed;
      }
    }
  }
  return passed;
}

}  // namespace moss_tests
