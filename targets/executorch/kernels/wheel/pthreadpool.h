// SPDX-License-Identifier: Apache-2.0
//
// What ExecuTorch's threadpool.h names of pthreadpool, whose own header its Python package leaves out.

#ifndef MOSSQUANT_PTHREADPOOL_H_
#define MOSSQUANT_PTHREADPOOL_H_

extern "C" {
typedef struct pthreadpool* pthreadpool_t;
void pthreadpool_destroy(pthreadpool_t pool);
}

#endif  // MOSSQUANT_PTHREADPOOL_H_
