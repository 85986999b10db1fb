/* SPDX-License-Identifier: Apache-2.0
 *
 * libmoss: runs a .moss file, a MossNet or Mamba language model that `mossquant export --target native` wrote.
 *
 *     moss_model* model = moss_open("model.moss", NULL);
 *     moss_state* state = moss_state_create(model, 1);
 *     moss_forward(model, state, tokens, count, MOSS_LAST, logits);
 *
 * Plain C, from any language. A function that can fail says so by its result (MOSS_ERROR, or NULL in place of a
 * handle), and moss_last_error() then gives one line. Nothing is written to the standard streams, no signal is raised,
 * no exception leaves. Handles are opaque. A model may be shared by threads as long as they call it one after the
 * other; a state belongs to its model, which must outlive it.
 */

#ifndef MOSS_H_
#define MOSS_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define MOSS_API __attribute__((visibility("default")))
#else
#define MOSS_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Of this header; moss_abi_version() gives that of the library. They must be equal. */
#define MOSS_ABI_VERSION 1

enum { MOSS_OK = 0, MOSS_ERROR = 1 };

/* Which positions logits are wanted of. */
enum { MOSS_LAST = 0, MOSS_ALL = 1 };

typedef struct moss_model moss_model;
typedef struct moss_state moss_state;

typedef struct moss_options {
  int32_t threads;    /* the calling one included; 0: as many as there are cores */
  const char* isa;    /* the most that kernels may use: "avx512vnni", "avx512", "avx2", "i8mm", "dotprod", "baseline";
                         NULL: whatever this machine can */
} moss_options;

MOSS_API int32_t moss_abi_version(void);

/* What went wrong in the last call of this thread that failed; never NULL, valid until its next call. */
MOSS_API const char* moss_last_error(void);

/* Opens a file: it is mapped, and its header, sizes and offsets are checked; hashes are not. NULL: see moss_last_error.
 * options may be NULL. */
MOSS_API moss_model* moss_open(const char* path, const moss_options* options);
MOSS_API void moss_close(moss_model* model);

MOSS_API int32_t moss_set_threads(moss_model* model, int32_t threads);

MOSS_API int64_t moss_vocab_size(const moss_model* model);
/* The layout that the weights of the file are packed in: "x86", "arm" or "rows". */
MOSS_API const char* moss_layout(const moss_model* model);
/* The kernel of its linears, e.g. "moss_linear_f32_int8_block_int4_g32_avx512vnni": of the format with most bytes. */
MOSS_API const char* moss_linear_kernel(const moss_model* model);
/* Whether this machine's kernels want another layout than the file's, so that weights were packed anew into memory. */
MOSS_API int32_t moss_repacked(const moss_model* model);
/* Bytes of the mapped file, and of memory that the model holds beside it, without states. */
MOSS_API int64_t moss_mapped_bytes(const moss_model* model);
MOSS_API int64_t moss_private_bytes(const moss_model* model);

/* The state of `batch` sequences before their first token; NULL: see moss_last_error. */
MOSS_API moss_state* moss_state_create(const moss_model* model, int64_t batch);
MOSS_API moss_state* moss_state_copy(const moss_state* state);
MOSS_API void moss_state_free(moss_state* state);
MOSS_API int64_t moss_state_batch(const moss_state* state);

/* The arrays of a state: of layer i, array 2 i is the last inputs of the convolution [d_inner, conv - 1], oldest first,
 * and array 2 i + 1 the state of the SSM [d_inner, states]; batch comes before both. Values are copied, in fp32
 * whatever format the model carries its states in: those that were read are written as they were, others are rounded to
 * the nearest that the format has. */
MOSS_API int64_t moss_state_arrays(const moss_model* model);
MOSS_API int64_t moss_state_size(const moss_model* model, int64_t array); /* of one sequence */
MOSS_API int32_t moss_state_read(const moss_state* state, int64_t array, float* values);
MOSS_API int32_t moss_state_write(moss_state* state, int64_t array, const float* values);
/* Tokens that were read since it began. How a state is rounded depends on it: arrays that are written to a new state go
 * on as they would have gone if the position is set as well. */
MOSS_API int64_t moss_state_position(const moss_state* state);
MOSS_API int32_t moss_state_set_position(moss_state* state, int64_t position);

/* Reads tokens [batch, time] and advances the state. logits [batch, time, vocab] (MOSS_ALL), or [batch, vocab] of the
 * last position (MOSS_LAST). Where a token is not of the vocabulary nothing is read and the state stays. */
MOSS_API int32_t moss_forward(moss_model* model, moss_state* state, const int64_t* tokens, int64_t time, int32_t which,
                              float* logits);

/* The same; of the last position the `count` largest logits and their tokens [batch, count], largest first, of equals
 * the lower token first. Logits of the whole vocabulary are never stored. */
MOSS_API int32_t moss_forward_top(moss_model* model, moss_state* state, const int64_t* tokens, int64_t time,
                                  int64_t count, int64_t* top_tokens, float* top_logits);

/* Where the time goes: while it is on, seconds of each part of the model add up. Turning it on begins at zero. */
MOSS_API int32_t moss_profile(moss_model* model, int32_t on);
MOSS_API int64_t moss_profile_parts(void);
MOSS_API const char* moss_profile_name(int64_t part);
MOSS_API double moss_profile_seconds(const moss_model* model, int64_t part);

#ifdef __cplusplus
}
#endif

#endif /* MOSS_H_ */
