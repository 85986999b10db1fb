// SPDX-License-Identifier: Apache-2.0
//
// What bench/peers.py calls of llama.cpp, by its header alone, and a read of memory at full speed. Compiled against the
// libllama that the script built; called through ctypes, as libmoss is.

#include <llama.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

constexpr std::uint32_t kRowsAtOnce = 512;

// Whatever a model's loading says is no part of the measurement; errors are.
void log_errors(ggml_log_level level, const char* text, void*) {
  if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

using Vector = std::uint64_t __attribute__((vector_size(64)));

// Several places at once: one stream alone is read a tenth slower.
void read_range(const Vector* data, std::size_t count) {
  constexpr std::size_t kStreams = 4;
  Vector sums[kStreams] = {};
  const std::size_t length = count / kStreams;
  for (std::size_t i = 0; i < length; ++i) {
    for (std::size_t stream = 0; stream < kStreams; ++stream) sums[stream] ^= data[stream * length + i];
  }
  const Vector sum = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  std::uint64_t all = 0;
  for (std::size_t lane = 0; lane < sizeof(Vector) / sizeof all; ++lane) all ^= sum[lane];
  asm volatile("" : : "r"(all) : "memory");  // every pass is read
}

}  // namespace

extern "C" {

struct Peer {
  llama_model* model;
  llama_context* context;
  std::vector<std::int8_t> every;
};

const char* peer_system() {
  llama_backend_init();
  return llama_print_system_info();
}

// Writes `to` from a GGUF in fp32: `type` of the matrices, and of the tied table, where -1 leaves it to llama.cpp.
std::int32_t peer_quantize(const char* from, const char* to, std::int32_t type, std::int32_t table) {
  llama_log_set(log_errors, nullptr);
  llama_backend_init();
  llama_model_quantize_params params = llama_model_quantize_default_params();
  params.ftype = static_cast<llama_ftype>(type);
  params.nthread = 1;
  if (table >= 0) params.token_embedding_type = params.output_tensor_type = static_cast<ggml_type>(table);
  return static_cast<std::int32_t>(llama_model_quantize(from, to, &params));
}

// Null where it cannot be opened. Defaults, but for threads and pieces of 512 tokens.
Peer* peer_open(const char* path, std::int32_t threads, std::int32_t prompt) {
  llama_log_set(log_errors, nullptr);
  llama_backend_init();
  llama_model* const model = llama_model_load_from_file(path, llama_model_default_params());
  if (model == nullptr) return nullptr;
  llama_context_params params = llama_context_default_params();
  params.n_ctx = params.n_batch = std::max(static_cast<std::uint32_t>(prompt), kRowsAtOnce);
  params.n_ubatch = kRowsAtOnce;
  params.n_threads = params.n_threads_batch = threads;
  llama_context* const context = llama_init_from_model(model, params);
  return context ? new Peer{model, context, std::vector<std::int8_t>(params.n_batch, 1)} : nullptr;
}

std::int32_t peer_vocabulary(const Peer* peer) {
  return llama_vocab_n_tokens(llama_model_get_vocab(peer->model));
}

void peer_reset(Peer* peer) { llama_memory_clear(llama_get_memory(peer->context), true); }

// Logits of every token or of the last, one row after the other, in memory of the context; null where it failed.
const float* peer_read(Peer* peer, std::int32_t* tokens, std::int32_t count, std::int32_t every) {
  llama_batch batch = llama_batch_get_one(tokens, count);
  if (every) batch.logits = peer->every.data();
  return llama_decode(peer->context, batch) == 0 ? llama_get_logits(peer->context) : nullptr;
}

// 10⁹ bytes a second that `threads` read of memory, each its own part, `passes` times.
double peer_bandwidth(const void* data, std::size_t bytes, std::int32_t threads, std::int32_t passes) {
  const Vector* const vectors = static_cast<const Vector*>(data);
  const std::size_t count = bytes / sizeof(Vector);
  std::atomic<std::int32_t> waiting{0};
  std::atomic<bool> go{false};
  const auto part = [&](std::int32_t i) {
    const std::size_t first = count * i / threads, end = count * (i + 1) / threads;
    for (std::int32_t pass = 0; pass < passes; ++pass) read_range(vectors + first, end - first);
  };
  std::vector<std::thread> others;
  for (std::int32_t i = 1; i < threads; ++i) {
    others.emplace_back([&, i] {
      ++waiting;
      while (!go) std::this_thread::yield();
      part(i);
    });
  }
  while (waiting < threads - 1) std::this_thread::yield();
  const auto start = std::chrono::steady_clock::now();
  go = true;
  part(0);
  for (std::thread& other : others) other.join();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  return 1e-9 * static_cast<double>(count * sizeof(Vector)) * passes / seconds.count();
}

}  // extern "C"
