/* SPDX-License-Identifier: Apache-2.0
 *
 * libmoss block by block: for another runtime whose operators these are. It holds weights and states itself, and gives
 * pointers to them with every call; nothing of them is kept, checked for other things than its size, or changed but
 * states and outputs.
 *
 *     moss_worker* worker = moss_worker_create(NULL, NULL);
 *     moss_embedding(worker, &table, vocab, hidden, tokens, time, x);
 *     for (each layer) moss_ssm_block(worker, &shape, &ssm, 1, time, x, window, h), moss_mlp_block(…);
 *     moss_head(worker, &head, vocab, hidden, norm, eps, time, x, logits);
 *
 * Letters: D hidden, E inner, N states, W width of the convolution, R rank of dt, F hidden of the MLPs, X experts, V
 * vocabulary. Arrays are contiguous and row-major, fp32 at multiples of 4 bytes. Small tensors are given in the form in
 * which the kernels read them, so that a call prepares nothing. Errors are reported as in moss.h, before anything is
 * computed: outputs and states are then as they were.
 */

#ifndef MOSS_BLOCKS_H_
#define MOSS_BLOCKS_H_

#include "moss.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What a matrix is stored in. */
enum { MOSS_FLOAT32 = 0, MOSS_INT8 = 1, MOSS_INT8_G32 = 2, MOSS_INT4_G32 = 3, MOSS_INT4_G128 = 4 };

/* What a quantized matrix is packed for: processors of a family, or none in particular. */
enum { MOSS_ROWS = 0, MOSS_X86 = 1, MOSS_ARM = 2 };

/* A matrix [outputs, columns]; the sizes follow from where it is used. */
typedef struct moss_matrix {
  const void* data;   /* packed as in a .moss; or values */
  int64_t bytes;      /* as many as that takes, or more */
  int32_t format;     /* MOSS_FLOAT32 … */
  int32_t layout;     /* MOSS_ROWS …; of MOSS_FLOAT32 it does not matter */
} moss_matrix;

typedef struct moss_shape {
  int64_t hidden, inner, states, width, rank, mlp_hidden; /* rank … are read by the blocks that have them */
  float eps;                                              /* of the norm */
} moss_shape;

/* A block of a Mamba mixer, with its norm. With one expert there is no router. */
typedef struct moss_ssm {
  int64_t experts, chosen;    /* of a token */
  const float* norm;          /* [D] */
  const float* router;        /* [X, D] */
  moss_matrix in_proj;        /* x [E, D], and z [E, D] behind it, each packed by itself */
  const float* conv;          /* [W, E] */
  const float* conv_bias;     /* [E] */
  const moss_matrix* x_proj;  /* of each expert [R + 2 N, E] */
  const moss_matrix* dt_proj; /* of each expert [E, R] */
  const float* dt_bias;       /* [X, E] */
  const float* rate;          /* [strips, N, 16]: A log2(e) in strips of 16 channels, the last one filled up with 0 */
  const float* D;             /* [E] */
  moss_matrix out_proj;       /* [D, E] */
} moss_ssm;

/* A block of MLPs, with its norm. With one expert there is no router. */
typedef struct moss_mlp {
  int64_t experts, chosen;
  const float* norm;          /* [D] */
  const float* router;        /* [X, D] */
  const moss_matrix *w1, *w3; /* of each expert [F, D] */
  const moss_matrix* w2;      /* of each expert [D, F] */
} moss_mlp;

/* Threads of the host in place of ours: for_units calls run(work, unit) for every unit of 0 … units - 1, on any of
 * them, and returns when all are done. */
typedef struct moss_pool {
  int32_t threads;            /* the calling one included */
  void* host;
  void (*for_units)(void* host, int64_t units, void (*run)(const void* work, int64_t unit), const void* work);
} moss_pool;

/* Kernels, threads, and memory that calls need, kept from one to the next: as much as the longest one. Not for two
 * threads at once. Either may be NULL; with a pool, the threads of options are not looked at. */
typedef struct moss_worker moss_worker;
MOSS_API moss_worker* moss_worker_create(const moss_options* options, const moss_pool* pool);
MOSS_API void moss_worker_free(moss_worker* worker);

/* The layout that the kernels of this machine want; every other is refused. -1 without a worker. */
MOSS_API int32_t moss_worker_layout(const moss_worker* worker);

/* x [count, columns]: rows of a table [rows, columns]. Where a token is not one of them nothing is written. */
MOSS_API int32_t moss_embedding(moss_worker* worker, const moss_matrix* table, int64_t rows, int64_t columns,
                                const int64_t* tokens, int64_t count, float* x);

/* x [batch, time, D] += block(norm(x)); window [batch, W - 1, E], oldest first, and h [batch, strips, N, 16], in strips
 * of 16 channels as `rate`, advance. Where memory runs out on the way, window and h are neither old nor new. */
MOSS_API int32_t moss_ssm_block(moss_worker* worker, const moss_shape* shape, const moss_ssm* ssm, int64_t batch,
                                int64_t time, float* x, float* window, float* h);

/* x [rows, D] += block(norm(x)). */
MOSS_API int32_t moss_mlp_block(moss_worker* worker, const moss_shape* shape, const moss_mlp* mlp, int64_t rows,
                                float* x);

/* logits [rows, V] of x [rows, D]: head [V, D] times norm(x). */
MOSS_API int32_t moss_head(moss_worker* worker, const moss_matrix* head, int64_t vocabulary, int64_t hidden,
                           const float* norm, float eps, int64_t rows, const float* x, float* logits);

#ifdef __cplusplus
}
#endif

#endif /* MOSS_BLOCKS_H_ */
