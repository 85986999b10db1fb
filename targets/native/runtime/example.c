/* SPDX-License-Identifier: Apache-2.0
 *
 * Continues a prompt of token ids greedily, with nothing but moss.h and libmoss.
 *
 *     cc example.c -I"$(mossquant native-path)/include" -L"$(mossquant native-path)/lib" -lmoss \
 *        -Wl,-rpath,"$(mossquant native-path)/lib" -o example
 *     ./example model.moss 64 17 4 99
 */

#include <stdio.h>
#include <stdlib.h>

#include "moss.h"

int main(int argc, char** argv) {
  if (argc < 4) {
    fprintf(stderr, "usage: example MODEL.moss COUNT TOKEN...\n");
    return 2;
  }
  if (moss_abi_version() != MOSS_ABI_VERSION) {
    fprintf(stderr, "libmoss is of another version than moss.h\n");
    return 1;
  }
  const long count = atol(argv[2]);
  const int prompt = argc - 3;
  int64_t* const tokens = malloc((size_t)prompt * sizeof(int64_t));
  if (tokens == NULL) return 1;
  for (int i = 0; i < prompt; ++i) tokens[i] = atoll(argv[i + 3]);

  moss_model* const model = moss_open(argv[1], NULL);
  moss_state* const state = model ? moss_state_create(model, 1) : NULL;
  int64_t next = 0;
  float logit = 0;
  int32_t status = state ? moss_forward_top(model, state, tokens, prompt, 1, &next, &logit) : MOSS_ERROR;
  for (long i = 0; status == MOSS_OK && i < count; ++i) {
    printf(i == 0 ? "%lld" : " %lld", (long long)next);
    const int64_t token = next;
    status = moss_forward_top(model, state, &token, 1, 1, &next, &logit);
  }
  printf("\n");
  if (status != MOSS_OK) fprintf(stderr, "%s\n", moss_last_error());
  moss_state_free(state);
  moss_close(model);
  free(tokens);
  return status == MOSS_OK ? 0 : 1;
}
