// SPDX-License-Identifier: Apache-2.0
//
// Every mixer, swiglu and dense kernel that this machine can run against the formulas in float64, at sizes around the
// vector, the chunk and the number of states that stay in registers; that no cut of time or of channels changes a bit;
// and that rounded states are those of the scalar form.

#include "mixer/mixer.h"

#include <algorithm>
#include <cstring>

#include "compare.h"
#include "dense/dense.h"
#include "mixer/rounding.h"
#include "swiglu/swiglu.h"

namespace moss_tests {
namespace {

double silu(double x) { return x / (1 + std::exp(-x)); }

struct Shape {
  std::int64_t batch, time, channels, states, width;
};

// Runs unit by unit, channels cut at `cut`.
template <typename Unit>
void for_units(const Shape& shape, std::int64_t cut, const Unit& unit) {
  for (std::int64_t b = 0; b < shape.batch; ++b) {
    for (std::int64_t begin = 0; begin < shape.channels; begin += cut) {
      unit(b, begin, std::min(begin + cut, shape.channels));
    }
  }
}

bool same(const char* name, const char* what, const Floats& one, const Floats& other) {
  if (one == other) return true;
  std::printf("FAILED %s: cutting %s changes a bit\n", name, what);
  return false;
}

bool test_conv_of(const moss::MixerKernel& kernel, const Shape& shape) {
  const auto [B, T, E, N, W] = shape;
  Random random(static_cast<unsigned>(B + 7 * T + 131 * E + W));
  const Floats x = random.normal(B * T * E), weight = random.normal(W * E), bias = random.normal(E);
  const Floats window = random.normal(B * (W - 1) * E);
  const auto input = [&](std::int64_t b, std::int64_t t, std::int64_t e) {
    return static_cast<double>(t < 0 ? window[static_cast<std::size_t>((b * (W - 1) + t + W - 1) * E + e)]
                                     : x[static_cast<std::size_t>((b * T + t) * E + e)]);
  };
  Doubles expected, expected_window;
  for (std::int64_t b = 0; b < B; ++b) {
    for (std::int64_t t = 0; t < T; ++t) {
      for (std::int64_t e = 0; e < E; ++e) {
        double p = static_cast<double>(bias[static_cast<std::size_t>(e)]);
        for (std::int64_t w = 0; w < W; ++w) {
          p += static_cast<double>(weight[static_cast<std::size_t>(w * E + e)]) * input(b, t + w - (W - 1), e);
        }
        expected.push_back(silu(p));
      }
    }
    for (std::int64_t w = 0; w < W - 1; ++w) {
      for (std::int64_t e = 0; e < E; ++e) expected_window.push_back(input(b, T + w - (W - 1), e));
    }
  }
  // By a step at a time where time is 1, in channels of `cut`.
  const auto run = [&](std::int64_t time, std::int64_t cut, Floats* end) {
    Floats own = window, y = unset<float>(B * T * E);
    for (std::int64_t b = 0; b < B; ++b) {
      for (std::int64_t t = 0; t < T; t += time) {
        const std::int64_t at = (b * T + t) * E;
        const moss::MixerConvArgs args = {std::min(time, T - t), E, W, x.data() + at, weight.data(), bias.data(),
                                          own.data() + b * (W - 1) * E, y.data() + at};
        for_units({1, T, E, N, W}, cut, [&](auto, auto begin, auto last) { kernel.conv(args, 0, begin, last); });
      }
    }
    *end = own;
    return y;
  };
  Floats end, end_of_steps;
  const Floats whole = run(T, E, &end), steps = run(1, 16, &end_of_steps);
  char at[160];
  std::snprintf(at, sizeof(at), "%s conv B %d T %d E %d W %d", kernel.name, static_cast<int>(B), static_cast<int>(T),
                static_cast<int>(E), static_cast<int>(W));
  return close(at, whole, expected) && close(at, end, expected_window) && same(at, "time or channels", whole, steps) &&
         same(at, "time or channels", end, end_of_steps);
}

bool test_scan_of(const moss::MixerKernel& kernel, const Shape& shape) {
  const auto [B, T, E, N, W] = shape;
  Random random(static_cast<unsigned>(B + 7 * T + 131 * E + N));
  const std::int64_t stride = 2 * N + 3;
  const Floats x = random.normal(B * T * E), dt = random.normal(B * T * E, 1, -2), z = random.normal(B * T * E);
  const std::int64_t of_strips = moss::strip_count(E) * N * moss::kMaxLanes;
  const Floats bc = random.normal(B * T * stride), D = random.normal(E);
  Floats h0(static_cast<std::size_t>(B * of_strips)), rate(static_cast<std::size_t>(of_strips));
  for (std::int64_t e = 0; e < E; ++e) {
    for (std::int64_t n = 0; n < N; ++n) {
      rate[static_cast<std::size_t>(moss::in_strips(e, n, N))] = -std::fabs(random.normal(1)[0]) - 0.1f;
      for (std::int64_t b = 0; b < B; ++b) {
        h0[static_cast<std::size_t>(b * of_strips + moss::in_strips(e, n, N))] = random.normal(1)[0];
      }
    }
  }
  const auto at = [](const Floats& values, std::int64_t i) {
    return static_cast<double>(values[static_cast<std::size_t>(i)]);
  };
  Doubles expected, h = doubles(h0);
  for (std::int64_t b = 0; b < B; ++b) {
    for (std::int64_t t = 0; t < T; ++t) {
      for (std::int64_t e = 0; e < E; ++e) {
        const std::int64_t i = (b * T + t) * E + e, row = (b * T + t) * stride;
        const double delta = std::log1p(std::exp(at(dt, i)));
        double y = at(D, e) * at(x, i);
        for (std::int64_t n = 0; n < N; ++n) {
          double& state = h[static_cast<std::size_t>(b * of_strips + moss::in_strips(e, n, N))];
          state = std::exp2(delta * at(rate, moss::in_strips(e, n, N))) * state + delta * at(x, i) * at(bc, row + n);
          y += state * at(bc, row + N + n);
        }
        expected.push_back(y * silu(at(z, i)));
      }
    }
  }
  const auto run = [&](std::int64_t time, std::int64_t cut, Floats* end) {
    Floats own = h0, y = x;
    for (std::int64_t b = 0; b < B; ++b) {
      for (std::int64_t t = 0; t < T; t += time) {
        const std::int64_t first = b * T + t, from = first * E;
        const moss::MixerScanArgs args = {std::min(time, T - t),        E,           N,        y.data() + from,
                                          dt.data() + from,             z.data() + from, rate.data(),
                                          bc.data() + first * stride,   bc.data() + first * stride + N,
                                          stride,                       D.data(),    own.data() + b * of_strips,
                                          y.data() + from};
        for_units({1, T, E, N, W}, cut, [&](auto, auto begin, auto last) { kernel.scan[0](args, 0, begin, last); });
      }
    }
    *end = own;
    return y;
  };
  Floats end, end_of_steps;
  const Floats whole = run(T, E, &end), steps = run(1, 16, &end_of_steps);
  char what[160];
  std::snprintf(what, sizeof(what), "%s scan B %d T %d E %d N %d", kernel.name, static_cast<int>(B),
                static_cast<int>(T), static_cast<int>(E), static_cast<int>(N));
  return close(what, whole, expected) && close(what, end, h) && same(what, "time or channels", whole, steps) &&
         same(what, "time or channels", end, end_of_steps);
}

bool test_batch(const moss::MixerKernel& kernel) {
  const std::int64_t B = 3, T = 5, E = 20, N = 4, W = 4;
  Random random(3);
  const Floats x = random.normal(B * T * E), dt = random.normal(B * T * E), bc = random.normal(B * T * 2 * N);
  const Floats weight = random.normal(W * E), bias = random.normal(E), D = random.normal(E);
  const std::int64_t of_strips = moss::strip_count(E) * N * moss::kMaxLanes;
  const Floats rate = random.normal(of_strips, 0.1, -1);
  const auto run = [&](std::int64_t first, std::int64_t count) {
    Floats window((W - 1) * E * static_cast<std::size_t>(count)), h(static_cast<std::size_t>(of_strips * count));
    Floats c = unset<float>(count * T * E), y = c;
    const std::int64_t at = first * T * E;
    for_units({count, T, E, N, W}, E, [&](auto b, auto begin, auto end) {
      kernel.conv({T, E, W, x.data() + at, weight.data(), bias.data(), window.data(), c.data()}, b, begin, end);
      const float* const Bm = bc.data() + first * T * 2 * N;
      kernel.scan[0]({T, E, N, c.data(), dt.data() + at, x.data() + at, rate.data(), Bm, Bm + N, 2 * N, D.data(),
                      h.data(), y.data()},
                     b, begin, end);
    });
    return y;
  };
  Floats one_by_one;
  for (std::int64_t b = 0; b < B; ++b) {
    const Floats own = run(b, 1);
    one_by_one.insert(one_by_one.end(), own.begin(), own.end());
  }
  return same(kernel.name, "the batch", run(0, B), one_by_one);
}

// A scan whose states are rounded: its inputs, and what it makes of them.
struct Rounded {
  moss::StateName format;
  std::int64_t batch, time, channels, states;
  Floats x, dt, z, rate, bc, D;
  std::vector<std::uint32_t> places;
  std::vector<std::uint8_t> h;  // [B, strips, N, kMaxLanes]
  Floats scales, y;

  // With `exact` every state before it is rounded is the same in all forms: nothing decays, delta is 64.
  Rounded(moss::StateName format, std::int64_t B, std::int64_t T, std::int64_t E, std::int64_t N, bool exact)
      : format(format), batch(B), time(T), channels(E), states(N) {
    Random random(static_cast<unsigned>(B + 7 * T + 131 * E + N));
    const std::int64_t of_strips = moss::strip_count(E) * N * moss::kMaxLanes;
    x = random.normal(B * T * E), dt = random.normal(B * T * E, 1, -2), z = random.normal(B * T * E);
    rate = Floats(static_cast<std::size_t>(of_strips), 0.0f);
    bc = random.normal(B * T * 2 * N), D = random.normal(E);
    // Some states far smaller than others: subnormals of fp16 among them.
    for (std::size_t i = 0; i < bc.size(); i += 3) bc[i] *= 1e-8f;
    if (exact) {
      std::fill(dt.begin(), dt.end(), 64.0f);
      for (float& value : x) value = value < 0 ? -0.25f : 0.5f;
    } else {
      for (float& value : rate) value = -0.1f - std::fabs(random.normal(1)[0]);
    }
    places.resize(static_cast<std::size_t>(of_strips));
    moss::state_places(E, N, places.data());
    h.resize(static_cast<std::size_t>(B * of_strips * moss::kStateFormats[static_cast<int>(format)].bytes));
    scales.resize(static_cast<std::size_t>(B * moss::strip_count(E) * moss::kMaxLanes));
    y.resize(x.size());
  }

  // Steps in pieces of `piece`, channels cut at `cut`; the first is the token 5.
  void run(const moss::MixerKernel& kernel, std::int64_t piece, std::int64_t cut) {
    const std::int64_t T = time, E = channels, N = states, strips = moss::strip_count(E);
    const std::int64_t own = strips * N * moss::kMaxLanes * moss::kStateFormats[static_cast<int>(format)].bytes;
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int64_t t = 0; t < T; t += piece) {
        const std::int64_t from = (b * T + t) * E, row = (b * T + t) * 2 * N;
        Floats scratch = unset<float>(N * moss::kMaxLanes);
        // Single steps are given what they are rounded with; others compute it.
        std::vector<std::uint32_t> drawn(piece == 1 ? places.size() : 0);
        if (piece == 1) kernel.draw(places.data(), static_cast<std::int64_t>(places.size()), 5 + t, drawn.data());
        const moss::MixerScanArgs args = {
            std::min(piece, T - t), E, N, x.data() + from, dt.data() + from, z.data() + from, rate.data(),
            bc.data() + row, bc.data() + row + N, 2 * N, D.data(), h.data() + b * own, y.data() + from, 5 + t,
            places.data(), piece == 1 ? drawn.data() : nullptr, scales.data() + b * strips * moss::kMaxLanes, scratch.data()};
        for_units({1, T, E, N, 1}, cut, [&](auto, auto begin, auto end) {
          kernel.scan[static_cast<int>(format)](args, 0, begin, end);
        });
      }
    }
  }

  std::size_t channel(std::size_t i) const {
    return i / static_cast<std::size_t>(states * moss::kMaxLanes) * moss::kMaxLanes + i % moss::kMaxLanes;
  }
  // How far its neighbours are.
  double step(std::size_t i) const {
    if (format == moss::StateName::int8) return static_cast<double>(scales[channel(i)]);
    return std::fmax(std::fabs(value(i)) / 1024, 0x1p-24);
  }
  double value(std::size_t i) const {
    if (format == moss::StateName::fp16) {
      std::uint16_t half;
      std::memcpy(&half, h.data() + 2 * i, 2);
      return static_cast<double>(moss::from_half(half));
    }
    return static_cast<double>(static_cast<float>(static_cast<std::int8_t>(h[i])) * scales[channel(i)]);
  }
  std::size_t count() const { return h.size() / static_cast<std::size_t>(value_bytes()); }
  std::int64_t value_bytes() const { return moss::kStateFormats[static_cast<int>(format)].bytes; }
};

// The same codes and scales as the scalar form where nothing before the rounding differs; elsewhere, after one step
// from the same state, nearly all the same, and none off by more than a step of its format.
bool test_rounded_of(const moss::MixerKernel& kernel, moss::StateName format, std::int64_t T, std::int64_t E,
                     std::int64_t N) {
  const moss::MixerKernel& scalar = **(moss::mixer_kernels().end() - 1);
  char what[160];
  std::snprintf(what, sizeof(what), "%s %s T %d E %d N %d", kernel.name,
                moss::kStateFormats[static_cast<int>(format)].name, static_cast<int>(T), static_cast<int>(E),
                static_cast<int>(N));
  Rounded expected(format, 2, T, E, N, true), found = expected;
  expected.run(scalar, T, E);
  found.run(kernel, T, E);
  if (found.h != expected.h || found.scales != expected.scales) {
    std::printf("FAILED %s: states are not those of the scalar form\n", what);
    return false;
  }
  Rounded whole(format, 2, T, E, N, false), steps = whole, one(format, 2, 1, E, N, false);
  whole.run(kernel, T, E);
  steps.run(kernel, 1, 16);
  if (whole.h != steps.h || whole.scales != steps.scales || whole.y != steps.y) {
    std::printf("FAILED %s: cutting time or channels changes a bit\n", what);
    return false;
  }
  one.h = whole.h;
  one.scales = whole.scales;
  Rounded reference = one;
  one.run(kernel, 1, E);
  reference.run(scalar, 1, E);
  std::size_t differing = 0;
  double most = 0;
  for (std::size_t i = 0; i < one.count(); ++i) {
    const double off = std::fabs(one.value(i) - reference.value(i));
    if (off == 0) continue;
    most = std::fmax(most, off / reference.step(i));
    differing += off > 0.5 * reference.step(i);
  }
  if (most > 1.01 || differing > 2 + one.count() / 100) {
    std::printf("FAILED %s: %zu of %zu states differ, by up to %g steps\n", what, differing, one.count(), most);
    return false;
  }
  return close(what, one.y, doubles(reference.y));
}

// Where one state of a channel is NaN, all that the channel carries on are.
bool test_nan_of(const moss::MixerKernel& kernel) {
  Rounded steps(moss::StateName::int8, 1, 1, 17, 5, false);
  steps.bc[1] = std::numeric_limits<float>::quiet_NaN();  // of the second state
  steps.run(kernel, 1, 17);
  for (std::size_t i = 0; i < steps.count(); ++i) {
    if (steps.channel(i) >= 17 || std::isnan(steps.value(i))) continue;
    std::printf("FAILED %s: a state that is NaN is lost\n", kernel.name);
    return false;
  }
  return true;
}

bool test_swiglu_of(const moss::SwigluKernel& kernel) {
  bool passed = true;
  for (std::int64_t size : {0, 1, 15, 16, 17, 100}) {
    Random random(static_cast<unsigned>(size));
    const Floats a = random.normal(size, 5), b = random.normal(size);
    Doubles expected;
    for (std::size_t i = 0; i < a.size(); ++i) {
      expected.push_back(silu(static_cast<double>(a[i])) * static_cast<double>(b[i]));
    }
    Floats y = a;  // in place
    kernel.run({size, y.data(), b.data(), y.data()});
    passed = close(kernel.name, y, expected) && passed;
  }
  return passed;
}

bool test_dense_of(const moss::DenseKernel& kernel, std::int64_t M, std::int64_t K, std::int64_t N) {
  Random random(static_cast<unsigned>(M + 7 * K + 131 * N));
  const Floats x = random.normal(M * K), weight = random.normal(N * K), bias = random.normal(N);
  Doubles expected;
  for (std::int64_t m = 0; m < M; ++m) {
    for (std::int64_t n = 0; n < N; ++n) {
      double y = static_cast<double>(bias[static_cast<std::size_t>(n)]);
      for (std::int64_t k = 0; k < K; ++k) {
        y += static_cast<double>(x[static_cast<std::size_t>(m * K + k)]) *
             static_cast<double>(weight[static_cast<std::size_t>(n * K + k)]);
      }
      expected.push_back(y);
    }
  }
  Floats whole = unset<float>(M * N), cut = whole;
  kernel.run({M, K, N, x.data(), weight.data(), bias.data(), whole.data()}, 0, N);
  for (std::int64_t m = 0; m < M; ++m) {
    for (std::int64_t n = 0; n < N; ++n) {
      kernel.run({1, K, N, x.data() + m * K, weight.data(), bias.data(), cut.data() + m * N}, n, n + 1);
    }
  }
  return close(kernel.name, whole, expected) && same(kernel.name, "rows or outputs", whole, cut);
}

}  // namespace

bool test_mixer() {
  bool passed = true;
  for (const moss::MixerKernel* kernel : moss::mixer_kernels()) {
    if (!runs_here(*kernel)) continue;
    for (std::int64_t T : {1, 2, 31, 32, 33, 70}) {
      for (std::int64_t E : {1, 4, 17, 48, 70}) {
        for (std::int64_t W : {1, 2, 4}) passed = test_conv_of(*kernel, {2, T, E, 1, W}) && passed;
        for (std::int64_t N : {1, 4, 7, 16}) passed = test_scan_of(*kernel, {2, T, E, N, 1}) && passed;
      }
    }
    passed = test_nan_of(*kernel) && passed;
    for (const moss::StateName format : {moss::StateName::fp16, moss::StateName::int8}) {
      for (std::int64_t T : {1, 2, 33}) {
        for (std::int64_t E : {1, 17, 48}) {
          for (std::int64_t N : {1, 16, 17}) passed = test_rounded_of(*kernel, format, T, E, N) && passed;
        }
      }
    }
    passed = test_batch(*kernel) && passed;
  }
  for (const moss::SwigluKernel* kernel : moss::swiglu_kernels()) {
    if (runs_here(*kernel)) passed = test_swiglu_of(*kernel) && passed;
  }
  for (const moss::DenseKernel* kernel : moss::dense_kernels()) {
    if (!runs_here(*kernel)) continue;
    for (std::int64_t M : {0, 1, 8, 19}) {
      for (std::int64_t K : {1, 16, 33, 100}) {
        for (std::int64_t N : {1, 4, 7}) passed = test_dense_of(*kernel, M, K, N) && passed;
      }
    }
  }
  return passed;
}

}  // namespace moss_tests
