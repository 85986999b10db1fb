// SPDX-License-Identifier: Apache-2.0
//
// What bench/peers.py calls of llama.cpp, by its header alone. Compiled against the libllama that the script built;
// called through ctypes, as libmoss is.

#include <llama.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

constexpr std::uint32_t kRowsAtOnce = 512;

// Whatever a model's loading says is no part of the measurement; errors are.
void log_errors(ggml_log_level level, const char* text, void*) {
  if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
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

}  // extern "C"
