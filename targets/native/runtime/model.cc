// SPDX-License-Identifier: Apache-2.0

#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <map>
#include <stdexcept>

#include "mixer/rounding.h"

namespace moss {
namespace {

constexpr std::int64_t kVersion = 1, kVersionOfStates = 2;  // the second where states are rounded
constexpr std::int64_t kMostValue = std::int64_t{1} << 22;  // of a field of the config: nothing multiplies out of range
constexpr std::int64_t kMostExperts = 1 << 10;

std::int64_t padded(std::int64_t bytes) { return (bytes + kPackedAlignment - 1) / kPackedAlignment * kPackedAlignment; }

const WeightFormat* quantized_format(const std::string& name, WeightName* found) {
  for (std::size_t i = 0; i < std::size(kWeightFormats); ++i) {
    if (name != kWeightFormats[i].name) continue;
    *found = static_cast<WeightName>(i);
    return &kWeightFormats[i];
  }
  return nullptr;
}

std::int64_t float_bytes(const std::string& format) {
  if (format == "float32") return 4;
  if (format == "bfloat16" || format == "float16") return 2;
  throw std::runtime_error("number format '" + format + "' is not known to this release");
}

float from_upper(std::uint16_t upper) {
  const std::uint32_t bits = static_cast<std::uint32_t>(upper) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

std::vector<std::int64_t> counts(const Json& config, const char* name, std::int64_t layers, std::int64_t least) {
  const std::vector<Json>& values = config.at(name).array;
  if (static_cast<std::int64_t>(values.size()) != layers) {
    throw std::runtime_error(std::string(name) + " must have a number for each layer");
  }
  std::vector<std::int64_t> found;
  for (const Json& value : values) found.push_back(value.integer(name, least, kMostExperts));
  return found;
}

}  // namespace

void Matrix::row(std::int64_t n, float* out) const {
  if (quantized()) {
    packed_row(*kernel->layout, weight_format(format), columns, packed, n, out);
  } else {
    std::copy_n(values + n * columns, columns, out);
  }
}

Matrix Matrix::outputs_from(std::int64_t begin, std::int64_t count) const {
  Matrix part = *this;
  part.outputs = count;
  if (quantized()) {
    part.packed += begin / strip() * strip_bytes(*kernel->layout, weight_format(format), columns);
  } else {
    part.values += begin * columns;
  }
  return part;
}

Kernels::Kernels(CpuFlags given)
    : flags(given),
      quantize(&select(quantize_kernels(), given)),
      rms_norm(&select(rms_norm_kernels<float>(), given)),
      mixer(&select(mixer_kernels(), given)),
      swiglu(&select(swiglu_kernels(), given)),
      dense(&select(dense_kernels(), given)) {}

Model::Model(const std::string& path, CpuFlags flags, int threads) : file_(path), kernels_(flags) {
  const auto header = file_.metadata().find("moss");
  if (header == file_.metadata().end()) throw std::runtime_error("it is no .moss: its header has no 'moss'");
  const Json own = parse_json(header->second);
  const std::int64_t version = own.at("version").integer("version", 1, kMostValue);
  if (version != kVersion && version != kVersionOfStates) {
    throw std::runtime_error("its version is not " + std::to_string(kVersion) + " or " +
                             std::to_string(kVersionOfStates) + "; open it with the release that wrote it");
  }
  layout_name_ = own.at("layout").text("layout");
  for (const LinearLayout* layout : kLinearLayouts) {
    if (layout_name_ == layout->name) layout_ = layout;
  }
  if (layout_ == nullptr) throw std::runtime_error("layout '" + layout_name_ + "' is not known to this release");
  formats_ = own.at("formats");
  read_config(own.at("config"));
  config_.ssm_states.assign(static_cast<std::size_t>(config_.layers), StateName::fp32);
  if (version == kVersionOfStates) read_states(own.at("states"));
  read_tensors();
  if (version == kVersionOfStates) make_state_places();
  set_threads(threads);
}

void Model::read_config(const Json& json) {
  const auto field = [&](const char* name, std::int64_t least) {
    return json.at(name).integer(name, least, kMostValue);
  };
  config_.vocabulary = field("vocab_size", 1);
  config_.hidden = field("hidden_size", 1);
  config_.layers = field("num_hidden_layers", 1);
  config_.inner = field("d_inner", 1);
  config_.states = field("state_size", 1);
  config_.width = field("conv_kernel", 1);
  config_.rank = field("time_step_rank", 1);
  config_.mlp_hidden = field("mlp_intermediate_size", 0);
  config_.eps = static_cast<float>(json.at("rms_norm_eps").real("rms_norm_eps"));
  if (!(config_.eps > 0)) throw std::runtime_error("rms_norm_eps must be positive");
  config_.tied = json.at("tie_word_embeddings").truth("tie_word_embeddings");
  config_.ssm_experts = counts(json, "ssm_experts", config_.layers, 1);
  config_.ssm_chosen = counts(json, "ssm_chosen", config_.layers, 1);
  config_.mlp_experts = counts(json, "mlp_experts", config_.layers, 0);
  config_.mlp_chosen = counts(json, "mlp_chosen", config_.layers, 0);
  for (std::size_t i = 0; i < config_.ssm_experts.size(); ++i) {
    const bool routes = config_.ssm_chosen[i] <= config_.ssm_experts[i] &&
                        config_.mlp_chosen[i] <= config_.mlp_experts[i] &&
                        (config_.mlp_chosen[i] > 0) == (config_.mlp_experts[i] > 0);
    if (!routes) throw std::runtime_error("layer " + std::to_string(i) + " chooses other experts than it has");
  }
}

// State array's name -> format, of those that are not carried in fp32.
void Model::read_states(const Json& json) {
  std::map<std::string, Json> left = json.object;
  for (std::int64_t i = 0; i < config_.layers; ++i) {
    const auto found = left.find("layers." + std::to_string(i) + ".mixer.ssm");
    if (found == left.end()) continue;
    const std::string& name = found->second.text("the format of " + found->first);
    const auto format = std::find_if(std::begin(kStateFormats), std::end(kStateFormats),
                                     [&](const StateFormat& known) { return name == known.name; });
    if (format == std::end(kStateFormats)) {
      throw std::runtime_error("state format '" + name + "' is not known to this release");
    }
    config_.ssm_states[static_cast<std::size_t>(i)] = static_cast<StateName>(format - std::begin(kStateFormats));
    left.erase(found);
  }
  if (!left.empty()) throw std::runtime_error(left.begin()->first + " is no state that can be rounded");
}

// After the tensors: A_log has shown that inner times states is no larger than the file.
void Model::make_state_places() {
  const std::int64_t count = strip_count(config_.inner) * kMaxLanes * config_.states;
  state_places_ = reinterpret_cast<std::uint32_t*>(allocate(count * 4));
  moss::state_places(config_.inner, config_.states, state_places_);
}

std::uint8_t* Model::allocate(std::int64_t bytes) {
  memory_.push_back(allocate_aligned(bytes));
  private_bytes_ += bytes;
  return memory_.back().get();
}

std::string Model::format_of(const std::string& name) const { return formats_.at(name).text("the format of " + name); }

void Model::check_size(const std::string& name, const Bytes& bytes, std::int64_t expected) const {
  if (bytes.size == padded(expected)) return;
  throw std::runtime_error(name + " has " + std::to_string(bytes.size) + " bytes and needs " +
                           std::to_string(padded(expected)));
}

float* Model::floats(const std::string& name, const std::string& format, std::int64_t count) {
  const Bytes bytes = file_.tensor(name);
  check_size(name, bytes, count * float_bytes(format));
  auto* const found = reinterpret_cast<float*>(allocate(count * 4));
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint16_t half;
    if (format == "float32") {
      std::memcpy(found + i, bytes.data + 4 * i, 4);
    } else {
      std::memcpy(&half, bytes.data + 2 * i, 2);
      found[i] = format == "bfloat16" ? from_upper(half) : from_half(half);
    }
  }
  return found;
}

float* Model::values(const std::string& name, std::int64_t rows, std::int64_t columns) {
  WeightName weight;
  const std::string own = format_of(name);
  const WeightFormat* const format = quantized_format(own, &weight);
  if (format == nullptr) return floats(name, own, rows * columns);
  const Bytes bytes = file_.tensor(name);
  check_size(name, bytes, packed_bytes(kRowsLayout, *format, rows, columns));
  auto* const found = reinterpret_cast<float*>(allocate(rows * columns * 4));
  for (std::int64_t n = 0; n < rows; ++n) {
    packed_row(kRowsLayout, *format, columns, bytes.data, n, found + n * columns);
  }
  return found;
}

std::vector<Matrix> Model::matrices(const std::string& name, std::int64_t outputs, std::int64_t columns, int parts) {
  std::vector<Matrix> found(static_cast<std::size_t>(parts));
  WeightName weight;
  const std::string own = format_of(name);
  const WeightFormat* const format = quantized_format(own, &weight);
  const float* const all = format ? nullptr : floats(name, own, outputs * parts * columns);
  const std::int64_t size = format ? packed_bytes(*layout_, *format, outputs, columns) : 0;
  const Bytes bytes = file_.tensor(name);
  if (format) check_size(name, bytes, size * parts);
  for (int i = 0; i < parts; ++i) {
    Matrix& matrix = found[static_cast<std::size_t>(i)];
    matrix.outputs = outputs;
    matrix.columns = columns;
    if (format == nullptr) {
      matrix.values = all + i * outputs * columns;
      continue;
    }
    matrix.format = weight;
    matrix.kernel = &select(linear_kernels(LinearInput::int8_block, weight), kernels_.flags);
    matrix.packed = bytes.data + i * size;
    if (bytes.size > most_bytes_) {
      most_bytes_ = bytes.size;
      linear_kernel_ = matrix.kernel->name;
    }
    if (matrix.kernel->layout == layout_) continue;
    repacked_ = true;
    std::vector<std::int8_t> codes(static_cast<std::size_t>(outputs * columns));
    std::vector<std::uint8_t> scales(
        static_cast<std::size_t>(outputs * scale_count(*format, columns) * scale_bytes(*format)));
    unpack_weight(*layout_, *format, outputs, columns, matrix.packed, codes.data(), scales.data());
    std::uint8_t* const packed = allocate(packed_bytes(*matrix.kernel->layout, *format, outputs, columns));
    // A damaged code that no format has is refused here; kernels compute with it without harm.
    if (!pack_weight(*matrix.kernel->layout, *format, outputs, columns, codes.data(), scales.data(), packed)) {
      throw std::runtime_error(name + " holds a code that " + own + " does not have");
    }
    matrix.packed = packed;
  }
  return found;
}

Matrix Model::matrix(const std::string& name, std::int64_t outputs, std::int64_t columns) {
  return matrices(name, outputs, columns)[0];
}

Matrix Model::router(const std::string& name, std::int64_t experts) {
  const Matrix found = matrix(name, experts, config_.hidden);
  if (found.quantized()) throw std::runtime_error(name + " is quantized; a router must be kept in a float type");
  return found;
}

void Model::read_tensors() {
  const std::int64_t V = config_.vocabulary, D = config_.hidden, E = config_.inner, N = config_.states;
  const std::int64_t W = config_.width, R = config_.rank, F = config_.mlp_hidden;
  table_ = matrix("backbone.embeddings.weight", V, D);
  norm_ = values("backbone.norm_f.weight", 1, D);
  if (!config_.tied) head_ = matrix("lm_head.weight", V, D);
  for (std::int64_t i = 0; i < config_.layers; ++i) {
    const auto at = static_cast<std::size_t>(i);
    const std::string layer = "backbone.layers." + std::to_string(i), mixer = layer + ".mixer";
    const std::int64_t experts = config_.ssm_experts[at];
    layers_.emplace_back();
    Ssm& ssm = layers_.back().ssm;
    ssm.chosen = config_.ssm_chosen[at];
    ssm.norm = values(layer + ".norm.weight", 1, D);
    const std::vector<Matrix> in_proj = matrices(mixer + ".in_proj.weight", E, D, 2);
    ssm.in_x = in_proj[0];
    ssm.in_z = in_proj[1];
    // Stored as [E, 1, W], and quantized as [W, E]; here [W, E].
    WeightName unused;
    const std::string conv = mixer + ".conv1d.weight";
    float* const weight = values(conv, W, E);
    if (quantized_format(format_of(conv), &unused) == nullptr) {
      const std::vector<float> stored(weight, weight + W * E);
      for (std::int64_t e = 0; e < E; ++e) {
        for (std::int64_t w = 0; w < W; ++w) weight[w * E + e] = stored[static_cast<std::size_t>(e * W + w)];
      }
    }
    ssm.conv = weight;
    ssm.conv_bias = values(mixer + ".conv1d.bias", 1, E);
    if (experts > 1) ssm.router = router(mixer + ".router.weight", experts);
    for (std::int64_t e = 0; e < experts; ++e) {
      const std::string own = experts == 1 ? mixer : mixer + ".experts." + std::to_string(e);
      ssm.x_proj.push_back(matrix(own + ".x_proj.weight", config_.projected(), E));
      ssm.dt_proj.push_back(matrix(own + ".dt_proj.weight", E, R));
      ssm.dt_bias.push_back(values(own + ".dt_proj.bias", 1, E));
    }
    // A = -exp(A_log), times log2(e) for the scan; in float64, rounded once.
    const float* const logs = values(mixer + ".A_log", E, N);
    const std::int64_t of_strips = strip_count(E) * N * kMaxLanes;
    auto* const rate = reinterpret_cast<float*>(allocate(of_strips * 4));
    std::fill_n(rate, of_strips, 0.0f);
    for (std::int64_t e = 0; e < E; ++e) {
      for (std::int64_t n = 0; n < N; ++n) {
        const double A = -std::exp(static_cast<double>(logs[e * N + n]));
        rate[in_strips(e, n, N)] = static_cast<float>(A * 1.4426950408889634);
      }
    }
    private_bytes_ -= E * N * 4;
    memory_.erase(memory_.end() - 2);  // the logs
    ssm.rate = rate;
    ssm.D = values(mixer + ".D", 1, E);
    ssm.out_proj = matrix(mixer + ".out_proj.weight", D, E);

    Mlp& mlp = layers_.back().mlp;
    mlp.chosen = config_.mlp_chosen[at];
    const std::int64_t mlp_experts = config_.mlp_experts[at];
    if (mlp_experts == 0) continue;
    if (F == 0) throw std::runtime_error("mlp_intermediate_size must be positive where there are experts");
    mlp.norm = values(layer + ".norm2.weight", 1, D);
    if (mlp_experts > 1) mlp.router = router(layer + ".mlp.router.weight", mlp_experts);
    for (std::int64_t e = 0; e < mlp_experts; ++e) {
      const std::string own = layer + ".mlp.experts." + std::to_string(e);
      mlp.w1.push_back(matrix(own + ".w1.weight", F, D));
      mlp.w3.push_back(matrix(own + ".w3.weight", F, D));
      mlp.w2.push_back(matrix(own + ".w2.weight", D, F));
    }
  }
}

}  // namespace moss
