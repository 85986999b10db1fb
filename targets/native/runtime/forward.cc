// SPDX-License-Identifier: Apache-2.0
//
// The pass goes through the model a piece of the tokens at a time, of at most kPieceRows rows (sequences and steps
// together), so that memory does not grow with the prompt. A piece goes from one region of work to the next; within
// one, threads share units that no two of them write.
//
//     normed, quantized -> in_proj -> convolution -> quantized -> x_proj of the chosen experts -> gated deltas,
//     quantized -> dt_proj of the experts, summed -> scan with its gate -> quantized -> out_proj
//
// Rows are gathered by expert once; the weights of an expert that nobody chose are not touched. Letters as in the
// kernels' headers; M is the rows of a piece.

#include "forward.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "tiles.h"

namespace moss {
namespace {

constexpr std::int64_t kPieceRows = 128;
constexpr std::int64_t kRowsOfUnit = 8;          // where rows are the units
constexpr std::int64_t kHeadTile = 512;          // outputs of the head of which only the largest are kept; whole strips
constexpr std::int64_t kBlocks[] = {32, 128};    // of inputs: one of each weight format (linear/format.h)

// Rows [M, K] that enter linears: in fp32, and where a matrix asks for it in codes, by the size of their blocks.
struct Input {
  const float* x;
  std::int64_t rows;
  std::int64_t columns;
  struct Codes {
    std::int8_t* codes = nullptr;
    float* scales = nullptr;
    std::int32_t* sums = nullptr;
  } quantized[2] = {};

  static int index(std::int64_t block) { return block == kBlocks[0] ? 0 : 1; }
  std::int64_t blocks(int i) const { return (columns + kBlocks[i] - 1) / kBlocks[i]; }
  // Rows from `first` on.
  Input from(std::int64_t first, std::int64_t count) const {
    Input own = *this;
    own.rows = count;
    own.x += first * columns;
    for (int i = 0; i < 2; ++i) {
      if (!quantized[i].codes) continue;
      own.quantized[i].codes += first * blocks(i) * kBlocks[i];
      own.quantized[i].scales += first * blocks(i);
      own.quantized[i].sums += first * blocks(i);
    }
    return own;
  }
};

// y [M, N] = input * matrix^T + bias.
struct Linear {
  const Matrix* matrix;
  const Input* input;
  const float* bias;  // [N]; null: none
  float* y;
};

// The rows that chose an expert, ascending; `rows` null: every row, in order. `gates` null: 1.
struct Group {
  std::int64_t expert;
  std::int64_t count;
  const std::int32_t* rows;
  const float* gates;

  std::int64_t row(std::int64_t i) const { return rows ? rows[i] : i; }
  float gate(std::int64_t i) const { return gates ? gates[i] : 1.0f; }
};

class Pass {
 public:
  Pass(const Work& work, std::int64_t batch)
      : kernels_(work.kernels),
        shape_(work.shape),
        arena_(work.arena),
        profile_(work.profile),
        pool_(work.pool),
        batch_(batch) {}

  void run(const Model& model, State& state, const std::int64_t* tokens, std::int64_t time, const Wanted& wanted) {
    const std::int64_t length = std::max<std::int64_t>(1, kPieceRows / batch_);
    arena_.clear();
    for (std::int64_t t0 = 0; t0 < time; t0 += length) {
      const Arena::Mark mark = arena_.mark();
      const std::int64_t steps = std::min(length, time - t0);
      begin(arena_.take<float>(batch_ * steps * shape_.hidden), steps);
      position_ = state.position() + t0;
      state_places_ = model.state_places();
      draw();
      {
        const Timed timed = time_of(Part::embedding);
        for (std::int64_t m = 0; m < rows_; ++m) {
          model.table().row(tokens[m / steps_ * time + t0 + m % steps_], residual_ + m * shape_.hidden);
        }
      }
      for (std::int64_t i = 0; i < model.config().layers; ++i) {
        const Layer& layer = model.layers()[static_cast<std::size_t>(i)];
        ssm(layer.ssm, state.window(i), state.scanned(i));
        if (!layer.mlp.w1.empty()) mlp(layer.mlp);
      }
      if (wanted.all) {
        all_logits(model.norm(), model.head(), wanted.all, time, t0);
      } else if (t0 + length >= time) {
        last_logits(model.norm(), model.head(), wanted);
      }
      arena_.release(mark);
    }
    state.set_position(state.position() + time);
  }

  // Single blocks, on residual [B, steps, D].
  void block(const Ssm& own, std::int64_t steps, float* residual, float* window, float* h) {
    begin(residual, steps);
    ssm(own, window, {StateName::fp32, h, nullptr});
  }
  void block(const Mlp& own, std::int64_t steps, float* residual) {
    begin(residual, steps);
    mlp(own);
  }
  void head(const float* norm, const Matrix& matrix, std::int64_t steps, float* residual, float* logits) {
    begin(residual, steps);
    all_logits(norm, matrix, logits, steps, 0);
  }

 private:
  void begin(float* residual, std::int64_t steps) {
    residual_ = residual;
    steps_ = steps;
    rows_ = batch_ * steps;
  }

  // How states are rounded after a single step, once for all layers and sequences.
  void draw() {
    drawn_ = nullptr;
    if (state_places_ == nullptr || steps_ != 1) return;
    const Timed timed = time_of(Part::scan);
    const std::int64_t count = strip_count(shape_.inner) * kMaxLanes * shape_.states;
    drawn_ = arena_.take<std::uint32_t>(count);
    kernels_.mixer->draw(state_places_, count, position_, drawn_);
  }

  int threads() const { return pool_.threads(); }

  Timed time_of(Part part) const { return Timed(&profile_, part); }

  template <typename Run>
  void for_units(std::int64_t units, const Run& run) {
    pool_.for_units(units, run);
  }

  // run(first, count) for ranges of rows.
  template <typename Run>
  void for_rows(std::int64_t rows, const Run& run) {
    for_units((rows + kRowsOfUnit - 1) / kRowsOfUnit, [&](std::int64_t unit) {
      const std::int64_t first = unit * kRowsOfUnit;
      run(first, std::min(kRowsOfUnit, rows - first));
    });
  }

  // run(b, begin, end) for ranges of channels of each sequence.
  template <typename Run>
  void for_channels(Part part, const Run& run) {
    const Timed timed = time_of(part);
    const Tiles tiles(shape_.inner, kTile, threads());
    for_units(batch_ * tiles.count(), [&](std::int64_t unit) {
      const std::int64_t i = unit % tiles.count();
      run(unit / tiles.count(), tiles.begin(i), tiles.end(i));
    });
  }

  float* normed(const float* x, std::int64_t rows, const float* weight) {
    const Timed timed = time_of(Part::norm);
    const std::int64_t D = shape_.hidden;
    float* const y = arena_.take<float>(rows * D);
    for_rows(rows, [&](std::int64_t first, std::int64_t count) {
      kernels_.rms_norm->run({count, D, x + first * D, weight, shape_.eps, y + first * D});
    });
    return y;
  }

  // Sees to it that the input has what the matrix asks for.
  void quantize(Input* input, const Matrix& matrix) {
    if (!matrix.quantized()) return;
    const int i = Input::index(matrix.block());
    Input::Codes& own = input->quantized[i];
    if (own.codes) return;
    const Timed timed = time_of(Part::quantize);
    const std::int64_t blocks = input->blocks(i), columns = blocks * kBlocks[i];
    own.codes = arena_.take<std::int8_t>(input->rows * columns);
    own.scales = arena_.take<float>(input->rows * blocks);
    own.sums = arena_.take<std::int32_t>(input->rows * blocks);
    for_rows(input->rows, [&](std::int64_t first, std::int64_t count) {
      kernels_.quantize->run({count, input->columns, kBlocks[i], input->x + first * input->columns,
                              own.codes + first * columns, own.scales + first * blocks, own.sums + first * blocks});
    });
  }

  // The rows of a group, with what the matrices ask for; the input itself where the group has every row.
  Input gathered(Input* input, const Group& group, std::initializer_list<const Matrix*> matrices) {
    for (const Matrix* matrix : matrices) quantize(input, *matrix);
    if (!group.rows) return *input;
    Input own = {nullptr, group.count, input->columns, {}};
    const auto gather = [&](const auto* from, std::int64_t width) {
      using Value = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
      Value* const to = arena_.take<Value>(group.count * width);
      for (std::int64_t i = 0; i < group.count; ++i) {
        std::copy_n(from + group.rows[i] * width, width, to + i * width);
      }
      return to;
    };
    for (const Matrix* matrix : matrices) {
      if (!matrix->quantized()) {
        if (!own.x) own.x = gather(input->x, input->columns);
        continue;
      }
      const int i = Input::index(matrix->block());
      if (own.quantized[i].codes) continue;
      const Input::Codes& all = input->quantized[i];
      const std::int64_t blocks = input->blocks(i);
      own.quantized[i] = {gather(all.codes, blocks * kBlocks[i]), gather(all.scales, blocks), gather(all.sums, blocks)};
    }
    return own;
  }

  // Outputs begin .. end - 1; begin is a multiple of the matrix's strip.
  void run(const Linear& linear, std::int64_t begin, std::int64_t end) const {
    const Matrix& matrix = *linear.matrix;
    const Input& input = *linear.input;
    if (!matrix.quantized()) {
      kernels_.dense->run(
          {input.rows, matrix.columns, matrix.outputs, input.x, matrix.values, linear.bias, linear.y}, begin, end);
      return;
    }
    const Input::Codes& own = input.quantized[Input::index(matrix.block())];
    matrix.kernel->run({{input.rows, matrix.columns, matrix.outputs},
                        nullptr,
                        own.codes,
                        own.scales,
                        own.sums,
                        matrix.packed,
                        linear.bias,
                        linear.y},
                       begin, end);
  }

  // Several linears in one region; their inputs have what is asked for.
  void run(const std::vector<Linear>& linears, Part part) {
    const Timed timed = time_of(part);
    std::vector<Tiles> tiles;
    std::vector<std::int64_t> ends;
    std::int64_t units = 0;
    for (const Linear& linear : linears) {
      tiles.emplace_back(linear.matrix->outputs, linear.matrix->strip(), threads());
      ends.push_back(units += tiles.back().count());
    }
    for_units(units, [&](std::int64_t unit) {
      const auto i = static_cast<std::size_t>(std::upper_bound(ends.begin(), ends.end(), unit) - ends.begin());
      const std::int64_t own = unit - (ends[i] - tiles[i].count());
      run(linears[i], tiles[i].begin(own), tiles[i].end(own));
    });
  }

  // Top-k of the router's logits, softmax over those (Mixtral's rule); of equals the lower expert. Without a router one
  // group of every row.
  std::vector<Group> routed(const Matrix& router, std::int64_t experts, std::int64_t chosen, const float* x) {
    const std::int64_t M = rows_;
    if (experts == 1) return {{0, M, nullptr, nullptr}};
    const Timed timed = time_of(Part::router);
    float* const logits = arena_.take<float>(M * experts);
    for_rows(M, [&](std::int64_t first, std::int64_t count) {
      kernels_.dense->run({count, shape_.hidden, experts, x + first * shape_.hidden, router.values, nullptr,
                           logits + first * experts},
                          0, experts);
    });
    auto* const rows = arena_.take<std::int32_t>(M * experts);  // [X, M]; the first counts[e] of expert e
    float* const gates = arena_.take<float>(M * experts);
    std::vector<std::int64_t> counts(static_cast<std::size_t>(experts)), order(counts.size());
    std::iota(order.begin(), order.end(), 0);
    for (std::int64_t m = 0; m < M; ++m) {
      const float* const own = logits + m * experts;
      // A logit that is no number comes last, so that there is an order.
      const auto larger = [&](std::int64_t a, std::int64_t b) {
        if (std::isnan(own[a]) != std::isnan(own[b])) return std::isnan(own[b]);
        return own[a] > own[b] || (!(own[a] < own[b]) && a < b);
      };
      std::partial_sort(order.begin(), order.begin() + chosen, order.end(), larger);
      float sum = 0;
      for (std::int64_t k = 0; k < chosen; ++k) sum += std::exp(own[order[k]] - own[order[0]]);
      for (std::int64_t k = 0; k < chosen; ++k) {
        const std::int64_t e = order[k], at = e * M + counts[static_cast<std::size_t>(e)]++;
        rows[at] = static_cast<std::int32_t>(m);
        gates[at] = std::exp(own[e] - own[order[0]]) / sum;
      }
    }
    std::vector<Group> groups;
    for (std::int64_t e = 0; e < experts; ++e) {
      const std::int64_t count = counts[static_cast<std::size_t>(e)];
      if (count > 0) groups.push_back({e, count, count == M ? nullptr : rows + e * M, gates + e * M});
    }
    return groups;
  }

  // out[m] (+)= sum over the groups of row m of matrix_e input_e, times its gate where `gated`, plus gate times bias_e.
  void sum_experts(const std::vector<Group>& groups, const std::vector<Matrix>& matrices,
                   const std::vector<Input>& inputs, const std::vector<const float*>* biases, bool gated, bool adds,
                   float* out, Part part) {
    const std::int64_t N = matrices[0].outputs;
    const Group& first = groups[0];
    if (!first.gates && !adds) {
      run({{&matrices[0], &inputs[0], biases ? (*biases)[0] : nullptr, out}}, part);
      return;
    }
    const Timed timed = time_of(part);
    std::int64_t most = 0, strip = 1;
    for (const Group& group : groups) {
      most = std::max(most, group.count);
      strip = std::max(strip, matrices[static_cast<std::size_t>(group.expert)].strip());
    }
    float* const own = arena_.take<float>(most * N);
    const Tiles tiles(N, strip, threads());
    for_units(tiles.count(), [&](std::int64_t unit) {
      const std::int64_t begin = tiles.begin(unit), end = tiles.end(unit);
      if (!adds) {
        for (std::int64_t m = 0; m < rows_; ++m) std::fill(out + m * N + begin, out + m * N + end, 0.0f);
      }
      for (std::size_t g = 0; g < groups.size(); ++g) {
        const Group& group = groups[g];
        const auto e = static_cast<std::size_t>(group.expert);
        run({&matrices[e], &inputs[g], nullptr, own}, begin, end);
        const float* const bias = biases ? (*biases)[e] : nullptr;
        for (std::int64_t i = 0; i < group.count; ++i) {
          const float gate = group.gate(i), factor = gated ? gate : 1.0f;
          float* const to = out + group.row(i) * N;
          const float* const from = own + i * N;
          if (bias) {
            for (std::int64_t n = begin; n < end; ++n) to[n] += factor * from[n] + gate * bias[n];
          } else {
            for (std::int64_t n = begin; n < end; ++n) to[n] += factor * from[n];
          }
        }
      }
    });
  }

  void ssm(const Ssm& ssm, float* window, const Scanned& state) {
    const Arena::Mark mark = arena_.mark();
    const std::int64_t M = rows_, E = shape_.inner, N = shape_.states, R = shape_.rank, P = shape_.projected();
    const float* const u = normed(residual_, M, ssm.norm);
    Input entering = {u, M, shape_.hidden, {}};
    quantize(&entering, ssm.in_x);
    float* const x = arena_.take<float>(M * E);
    float* const z = arena_.take<float>(M * E);
    run({{&ssm.in_x, &entering, nullptr, x}, {&ssm.in_z, &entering, nullptr, z}}, Part::in_proj);
    const std::vector<Group> groups = routed(ssm.router, static_cast<std::int64_t>(ssm.x_proj.size()), ssm.chosen, u);

    float* const c = arena_.take<float>(M * E);
    for_channels(Part::conv, [&](std::int64_t b, std::int64_t begin, std::int64_t end) {
      kernels_.mixer->conv({steps_, E, shape_.width, x, ssm.conv, ssm.conv_bias, window, c}, b, begin, end);
    });

    Input convolved = {c, M, E, {}};
    std::vector<Input> own, deltas;
    std::vector<Linear> linears;
    std::vector<float*> projected;
    own.reserve(groups.size());
    for (const Group& group : groups) {
      const Matrix& x_proj = ssm.x_proj[static_cast<std::size_t>(group.expert)];
      own.push_back(gathered(&convolved, group, {&x_proj}));
      projected.push_back(arena_.take<float>(group.count * P));
      linears.push_back({&x_proj, &own.back(), nullptr, projected.back()});
    }
    run(linears, Part::x_proj);

    // The gated deltas of each expert by themselves; B and C summed over the experts, or where they are.
    const float* bc = projected[0] + R;
    std::int64_t bc_stride = P;
    if (groups[0].gates) {
      float* const sums = arena_.take<float>(M * 2 * N);
      std::fill_n(sums, M * 2 * N, 0.0f);
      for (std::size_t g = 0; g < groups.size(); ++g) {
        for (std::int64_t i = 0; i < groups[g].count; ++i) {
          const float* const from = projected[g] + i * P + R;
          float* const to = sums + groups[g].row(i) * 2 * N;
          for (std::int64_t n = 0; n < 2 * N; ++n) to[n] += groups[g].gate(i) * from[n];
        }
      }
      bc = sums;
      bc_stride = 2 * N;
    }
    for (std::size_t g = 0; g < groups.size(); ++g) {
      const Group& group = groups[g];
      float* const gated = arena_.take<float>(group.count * R);
      for (std::int64_t i = 0; i < group.count; ++i) {
        for (std::int64_t r = 0; r < R; ++r) gated[i * R + r] = group.gate(i) * projected[g][i * P + r];
      }
      deltas.push_back({gated, group.count, R, {}});
      quantize(&deltas.back(), ssm.dt_proj[static_cast<std::size_t>(group.expert)]);
    }
    float* const dt = arena_.take<float>(M * E);
    sum_experts(groups, ssm.dt_proj, deltas, &ssm.dt_bias, false, false, dt, Part::dt_proj);

    float* const y = x;
    const std::int64_t of_strips = strip_count(E) * N * kMaxLanes;
    float* const scratch = state.format == StateName::int8 ? arena_.take<float>(batch_ * of_strips) : nullptr;
    for_channels(Part::scan, [&](std::int64_t b, std::int64_t begin, std::int64_t end) {
      float* const own = scratch ? scratch + b * of_strips + in_strips(begin, 0, N) : nullptr;
      kernels_.mixer->scan[static_cast<int>(state.format)](
          {steps_, E, N, c, dt, z, ssm.rate, bc, bc + N, bc_stride, ssm.D, state.h, y, position_, state_places_, drawn_,
           state.scales, own},
          b, begin, end);
    });
    Input leaving = {y, M, E, {}};
    quantize(&leaving, ssm.out_proj);
    add_to_residual({&ssm.out_proj, &leaving, nullptr, nullptr}, Part::out_proj);
    arena_.release(mark);
  }

  void add_to_residual(Linear linear, Part part) {
    const Timed timed = time_of(part);
    const std::int64_t D = shape_.hidden;
    linear.y = arena_.take<float>(rows_ * D);
    const Tiles tiles(D, linear.matrix->strip(), threads());
    for_units(tiles.count(), [&](std::int64_t unit) {
      const std::int64_t begin = tiles.begin(unit), end = tiles.end(unit);
      run(linear, begin, end);
      for (std::int64_t m = 0; m < rows_; ++m) {
        for (std::int64_t d = begin; d < end; ++d) residual_[m * D + d] += linear.y[m * D + d];
      }
    });
  }

  void mlp(const Mlp& mlp) {
    const Arena::Mark mark = arena_.mark();
    const std::int64_t F = shape_.mlp_hidden;
    const float* const u = normed(residual_, rows_, mlp.norm);
    const std::vector<Group> groups = routed(mlp.router, static_cast<std::int64_t>(mlp.w1.size()), mlp.chosen, u);
    Input entering = {u, rows_, shape_.hidden, {}};
    std::vector<Input> own, hidden;
    std::vector<Linear> linears;
    own.reserve(groups.size());
    for (const Group& group : groups) {
      const auto e = static_cast<std::size_t>(group.expert);
      own.push_back(gathered(&entering, group, {&mlp.w1[e], &mlp.w3[e]}));
      linears.push_back({&mlp.w1[e], &own.back(), nullptr, arena_.take<float>(group.count * F)});
      linears.push_back({&mlp.w3[e], &own.back(), nullptr, arena_.take<float>(group.count * F)});
    }
    run(linears, Part::w1_w3);
    for (std::size_t g = 0; g < groups.size(); ++g) {
      float* const a = linears[2 * g].y;
      const float* const b = linears[2 * g + 1].y;
      const Timed timed = time_of(Part::swiglu);
      for_rows(groups[g].count, [&](std::int64_t first, std::int64_t count) {
        kernels_.swiglu->run({count * F, a + first * F, b + first * F, a + first * F});
      });
      hidden.push_back({a, groups[g].count, F, {}});
      quantize(&hidden.back(), mlp.w2[static_cast<std::size_t>(groups[g].expert)]);
    }
    sum_experts(groups, mlp.w2, hidden, nullptr, true, true, residual_, Part::w2);
    arena_.release(mark);
  }

  void all_logits(const float* norm, const Matrix& head, float* logits, std::int64_t time, std::int64_t t0) {
    Input entering = {normed(residual_, rows_, norm), rows_, shape_.hidden, {}};
    quantize(&entering, head);
    for (std::int64_t b = 0; b < batch_; ++b) {
      const Input own = entering.from(b * steps_, steps_);
      run({{&head, &own, nullptr, logits + (b * time + t0) * head.outputs}}, Part::head);
    }
  }

  void last_logits(const float* norm, const Matrix& head, const Wanted& wanted) {
    const std::int64_t B = batch_, D = shape_.hidden, V = head.outputs;
    float* const last = arena_.take<float>(B * D);
    for (std::int64_t b = 0; b < B; ++b) std::copy_n(residual_ + ((b + 1) * steps_ - 1) * D, D, last + b * D);
    Input entering = {normed(last, B, norm), B, D, {}};
    quantize(&entering, head);
    if (wanted.last) {
      run({{&head, &entering, nullptr, wanted.last}}, Part::head);
      return;
    }
    // Each unit keeps the largest of its tile.
    const Timed timed = time_of(Part::head);
    const std::int64_t K = wanted.count, tiles = (V + kHeadTile - 1) / kHeadTile;
    struct Top {
      float logit;
      std::int64_t token;
      // NaN comes last, so that the order is one.
      bool operator<(const Top& other) const {
        if (std::isnan(logit) != std::isnan(other.logit)) return std::isnan(other.logit);
        return logit > other.logit || (!(logit < other.logit) && token < other.token);
      }
    };
    std::vector<std::vector<Top>> tops(static_cast<std::size_t>(tiles * B));
    for_units(tiles, [&](std::int64_t tile) {
      const std::int64_t begin = tile * kHeadTile, end = std::min(V, begin + kHeadTile);
      const Matrix part = head.outputs_from(begin, end - begin);
      std::vector<float> logits(static_cast<std::size_t>(B * part.outputs));
      run({&part, &entering, nullptr, logits.data()}, 0, part.outputs);
      for (std::int64_t b = 0; b < B; ++b) {
        std::vector<Top>& own = tops[static_cast<std::size_t>(b * tiles + tile)];
        for (std::int64_t v = begin; v < end; ++v) {
          own.push_back({logits[static_cast<std::size_t>(b * part.outputs + v - begin)], v});
        }
        const auto kept = static_cast<std::size_t>(std::min<std::int64_t>(K, end - begin));
        std::partial_sort(own.begin(), own.begin() + static_cast<std::ptrdiff_t>(kept), own.end());
        own.resize(kept);
      }
    });
    for (std::int64_t b = 0; b < B; ++b) {
      std::vector<Top> all;
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const auto& own = tops[static_cast<std::size_t>(b * tiles + tile)];
        all.insert(all.end(), own.begin(), own.end());
      }
      std::partial_sort(all.begin(), all.begin() + K, all.end());
      for (std::int64_t k = 0; k < K; ++k) {
        wanted.top_tokens[b * K + k] = all[static_cast<std::size_t>(k)].token;
        wanted.top_logits[b * K + k] = all[static_cast<std::size_t>(k)].logit;
      }
    }
  }

  const Kernels& kernels_;
  const BlockShape& shape_;
  Arena& arena_;
  Profile& profile_;
  Pool& pool_;
  const std::int64_t batch_;   // B
  std::int64_t steps_ = 0;     // of each sequence in the piece
  std::int64_t rows_ = 0;      // M
  std::int64_t position_ = 0;  // of the piece's first step
  const std::uint32_t* state_places_ = nullptr;
  std::uint32_t* drawn_ = nullptr;
  float* residual_ = nullptr;  // [M, D]
};

}  // namespace

void forward(Model& model, State& state, const std::int64_t* tokens, std::int64_t time, const Wanted& wanted) {
  const Work work = {model.kernels(), model.config(), model.arena(), model.profile(), model.pool()};
  Pass(work, state.batch()).run(model, state, tokens, time, wanted);
}

void ssm_block(const Work& work, const Ssm& ssm, std::int64_t batch, std::int64_t time, float* residual, float* window,
               float* h) {
  if (time <= kPieceRows) {
    Pass(work, batch).block(ssm, time, residual, window, h);
    return;
  }
  const BlockShape& shape = work.shape;
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t t0 = 0; t0 < time; t0 += kPieceRows) {
      Pass(work, 1).block(ssm, std::min(kPieceRows, time - t0), residual + (b * time + t0) * shape.hidden, window, h);
    }
    if (window != nullptr) window += (shape.width - 1) * shape.inner;
    h += strip_count(shape.inner) * shape.states * kMaxLanes;
  }
}

void mlp_block(const Work& work, const Mlp& mlp, std::int64_t rows, float* residual) {
  Pass(work, 1).block(mlp, rows, residual);
}

void logits_of(const Work& work, const float* norm, const Matrix& head, std::int64_t rows, const float* residual,
               float* logits) {
  Pass(work, 1).head(norm, head, rows, const_cast<float*>(residual), logits);  // which only reads it
}

}  // namespace moss
