// SPDX-License-Identifier: Apache-2.0
//
// The weights of a .moss as the kernels of this machine read them. Matrices in the layout of the kernels stay where the
// file is mapped; everything else is decoded, or packed anew, into memory.

#ifndef MOSS_NATIVE_MODEL_H_
#define MOSS_NATIVE_MODEL_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "arena.h"
#include "cpu.h"
#include "dense/dense.h"
#include "file.h"
#include "json.h"
#include "linear/linear.h"
#include "mixer/mixer.h"
#include "pool.h"
#include "profile.h"
#include "quantize/quantize.h"
#include "rms_norm/rms_norm.h"
#include "swiglu/swiglu.h"

namespace moss {

// Of every block. Letters as in the kernels' headers.
struct BlockShape {
  std::int64_t hidden;      // D
  std::int64_t inner;       // E
  std::int64_t states;      // N
  std::int64_t width;       // W, of the convolution
  std::int64_t rank;        // R, of dt
  std::int64_t mlp_hidden;  // F
  float eps;

  std::int64_t projected() const { return rank + 2 * states; }  // rows of x_proj: delta, B, C
};

struct Config : BlockShape {
  std::int64_t vocabulary;  // V
  std::int64_t layers;
  bool tied;
  std::vector<std::int64_t> ssm_experts, ssm_chosen, mlp_experts, mlp_chosen;  // of each layer
  std::vector<StateName> ssm_states;                                           // the same
};

// A matrix [N, K]: quantized, or in fp32.
struct Matrix {
  std::int64_t outputs = 0;
  std::int64_t columns = 0;
  const LinearKernel* kernel = nullptr;  // null: fp32
  WeightName format = WeightName::int8;
  const std::uint8_t* packed = nullptr;
  const float* values = nullptr;

  bool quantized() const { return kernel != nullptr; }
  std::int64_t block() const { return weight_format(format).block; }
  std::int64_t strip() const { return kernel ? kernel->layout->strip : 1; }
  // Row n in fp32.
  void row(std::int64_t n, float* out) const;
  // `count` outputs from `begin` on, a multiple of the strip, as a matrix.
  Matrix outputs_from(std::int64_t begin, std::int64_t count) const;
};

struct Ssm {
  const float* norm;                // [D]
  Matrix in_x, in_z;                // [E, D]
  const float* conv;                // [W, E]
  const float* conv_bias;           // [E]
  Matrix router;                    // [X, D] in fp32; none where X is 1
  std::vector<Matrix> x_proj;       // [R + 2 N, E]
  std::vector<Matrix> dt_proj;      // [E, R]
  std::vector<const float*> dt_bias;  // [E]
  const float* rate;                // [strips, N, kMaxLanes]
  const float* D;                   // [E]
  Matrix out_proj;                  // [D, E]
  std::int64_t chosen;
};

struct Mlp {
  const float* norm;  // [D]
  Matrix router;      // as above
  std::vector<Matrix> w1, w3, w2;
  std::int64_t chosen;
};

struct Layer {
  Ssm ssm;
  Mlp mlp;  // without experts: there is none
};

// The kernels of this machine, but those of linears, which go by the matrix.
struct Kernels {
  CpuFlags flags;
  const QuantizeKernel* quantize;
  const RmsNormKernel<float>* rms_norm;
  const MixerKernel* mixer;
  const SwigluKernel* swiglu;
  const DenseKernel* dense;

  explicit Kernels(CpuFlags flags);
};

class Model {
 public:
  // Throws std::runtime_error, one line without the path: the file is damaged, or of another version.
  Model(const std::string& path, CpuFlags flags, int threads);

  const Config& config() const { return config_; }
  const Kernels& kernels() const { return kernels_; }
  const std::string& layout() const { return layout_name_; }
  bool repacked() const { return repacked_; }
  std::int64_t mapped_bytes() const { return file_.size(); }
  std::int64_t private_bytes() const { return private_bytes_ + arena_.bytes(); }
  const char* linear_kernel() const { return linear_kernel_; }
  const Matrix& table() const { return table_; }
  const Matrix& head() const { return config_.tied ? table_ : head_; }
  const float* norm() const { return norm_; }
  const std::vector<Layer>& layers() const { return layers_; }
  // What rounding of states hashes them to (mixer/mixer.h); null where none is rounded.
  const std::uint32_t* state_places() const { return state_places_; }

  Profile& profile() { return profile_; }
  const Profile& profile() const { return profile_; }
  Pool& pool() { return *pool_; }
  void set_threads(int threads) { pool_ = std::make_unique<Pool>(threads); }

  // Memory for one piece of a forward, kept from call to call.
  Arena& arena() { return arena_; }

 private:
  void read_config(const Json& header);
  void read_states(const Json& header);
  void make_state_places();
  void read_tensors();
  std::string format_of(const std::string& name) const;
  // A matrix of `parts` pieces of the same height, each packed by itself.
  std::vector<Matrix> matrices(const std::string& name, std::int64_t outputs, std::int64_t columns, int parts = 1);
  Matrix matrix(const std::string& name, std::int64_t outputs, std::int64_t columns);
  Matrix router(const std::string& name, std::int64_t experts);
  // A tensor whose matrix view is [rows, columns], in fp32; rows of it.
  float* values(const std::string& name, std::int64_t rows, std::int64_t columns);
  float* floats(const std::string& name, const std::string& format, std::int64_t count);
  void check_size(const std::string& name, const Bytes& bytes, std::int64_t expected) const;
  std::uint8_t* allocate(std::int64_t bytes);

  MappedFile file_;
  Kernels kernels_;
  Config config_;
  Json formats_;
  std::string layout_name_;
  const LinearLayout* layout_ = nullptr;
  bool repacked_ = false;
  std::int64_t private_bytes_ = 0;
  std::int64_t most_bytes_ = 0;
  const char* linear_kernel_ = "";
  Matrix table_, head_;
  const float* norm_ = nullptr;
  std::vector<Layer> layers_;
  std::uint32_t* state_places_ = nullptr;
  std::vector<Memory> memory_;
  Arena arena_;
  Profile profile_;
  std::unique_ptr<Pool> pool_;
};

}  // namespace moss

#endif  // MOSS_NATIVE_MODEL_H_
