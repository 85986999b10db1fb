# SPDX-License-Identifier: Apache-2.0
"""Every tolerance of the tests, with its reason. A bound is never widened to make a test pass.

Differences are the largest absolute ones; logits of the test models lie within ±10, scan outputs within ±40.
"""

FORMS_FLOAT64 = 1e-10
"""Sequential, chunked, fused and step forms against one another: some 10⁴ roundings of 1e-16 of values up to 40."""

REFERENCE_FLOAT64 = 1e-9
"""Our model in float64 against the scalar loop in plain Python: another order of every sum."""

SAME_SUM_FLOAT64 = 1e-12
"""The same terms in another order (experts permuted, or stacked) in float64, one pass of a few blocks."""

FORMS_FLOAT32 = 5e-5
"""The forms in fp32 against float64: half a rounding of 40 is 2e-6, and some twenty of them may meet in one sum."""

TRANSFORMERS_FLOAT32 = 1e-4
"""Logits in fp32 against `transformers`: two orders of the same sums."""

TRANSFORMERS_FLOAT64 = 1e-6
"""Logits in float64 against `transformers`, which computes norm, A and scan in fp32, for logits up to 3."""

TRANSFORMERS_WITHOUT_CASTS = 1e-11
"""The same with its casts to fp32 turned into float64: what is left is the order of sums."""

PLANTED_FAULT = 1e-3
"""What a planted fault has to move at least, where the bound is 1e-9: a test that could not fail would be none."""

CUT_NATS = 2e-5
"""Nats a token of one text in other pieces, batches or forms, in fp32: logits within ±10 are rounded at 1e-6 each."""

CODE_ROUNDING = 2.0**-16
"""In units of a scale: w / s and code · s are each rounded to fp32 (2⁻²⁴) of at most 128 units."""

SUM_ROUNDING = 1e-6
"""Relative: two fp32 sums of squares over a row, added in different orders."""

ONNX_FP32 = 1e-5
"""Relative to the largest logit: onnxruntime in fp32 against our model in float64 (a router's tie would show here)."""

ONNX_INT8_MEDIAN = 2e-6
"""Relative, the median over positions: int8 activations on the same codes; a rounding tie may upset single ones."""

ONNX_CUT = 1e-6
"""Relative: one text read by an .onnx in other pieces or batches; its kernels may sum in another order."""

NATIVE_FP32 = 1e-5
"""Relative to the largest logit: libmoss in fp32 against our model in float64 (a router's tie would show here)."""

NATIVE_INT8_MEDIAN = 1e-6
"""Relative, the median over single steps: int8 activations on the same codes, some sixteen roundings of fp32 on top; a
rounding tie may upset single ones."""

NATIVE_CUT = 1e-6
"""Relative: one text read by libmoss in other pieces or batches; kernels for more rows may sum in another order."""

STATE_TURNED = 0.002
"""Of the values of a rounded state, the median over steps: fp32 leaves 1e-7 of a value open, more where terms cancel; a
step of fp16 is 5e-4 of it or more. A wrong hash or token turns half of them."""

FORGOTTEN = 0.25
"""Of what forgetting the state does to the logits: the most that a state carried between two arithmetics may do."""
OPEN_BYTES = 1 << 24
"""Memory to open a checkpoint: blocks of rows are 2¹⁸ weights, some arrays of them; headers, ledger, first uses."""

EXPORT_CODES = 3
"""Bytes a weight to pack a quantized matrix: its codes, one a byte, the step before them, which the allocator gives
back or keeps, and the packed ones (one a byte at most). Packing the whole at once takes five."""

VERIFY_CODES = 5
"""Bytes a weight to compare one: the file's bytes, its codes and one step on the way there, the checkpoint's codes."""

EXECUTORCH_FP32 = 1e-5
"""Relative to the largest value: XNNPACK in fp32 against our model in float64, for logits and state."""

EXECUTORCH_MEDIAN_KL = 1e-7
"""Nats, the median of single steps from given states: what `mossquant.eval.parity` asks; a tie upsets its own step."""

EXECUTORCH_MEDIAN_STATE = 1e-5
"""Relative, the median of the state after single steps, as parity asks: fp32 rounding of values behind int8 codes."""

EXECUTORCH_FORMS_MEDIAN_KL = 1e-7
"""Nats, the median over positions of one text read in one call and token by token, free running."""

KL_IN_FLOAT32 = 3e-3
"""KL in fp32 against float64, relative: logits of ±16 are rounded at 1e-6, which is 1e-3 of differences of 1e-3."""

ESTIMATED_LOG_ERROR = 0.7
"""Root mean square of log(estimated / measured KL): 128 windows spread by 13 %, and some tenths are model error."""

STATE_STEADY = 0.01
"""Of the channel's largest value: how far a state format may let a constant input's steady state lie off, at decay
0.999. A code of int8 is 0.8 % of it, and a value that rests lies between two of them."""

STATE_STALLS = 0.1
"""Of the channel's largest value: what rounding to nearest keeps such a state from at least, in the cases planted."""

DRAWN_SIGMAS = 5.0
"""Standard errors of a mean of roundings, drawn by a fixed hash: one of some thousand means lies so far out by chance
once in a thousand sets of them."""

STRAIGHT_THROUGH = 1e-5
"""Gradients of a few values up to 10 through a rounding, in fp32, against PyTorch's own operations one by one."""

STATISTICS_FLOAT32 = 2e-5
"""Relative to the largest second moment: a model in fp32, and products of one pass in fp32, against float64."""

KL_OF_PASSES = 1e-4
"""Relative: logits within ±10 are rounded by 1e-6 in fp32, they differ by 0.1 and more, and KL goes by the square."""

MEMORY_SAID = 1.5
"""Measured over said, or said over measured: what is counted are tensors; the heap keeps holes between them."""

PROCESSES_FLOAT64 = 1e-12
"""Relative: sums of the same passes over one process and over two, in float64."""

BLOCK_ERROR_FLOAT32 = 1e-4
"""Relative: mean squared difference of a block's output, in fp32 against float64 or token by token; differences of 1e-2
of the output lose two of its seven digits."""

STEP_TIES = 5e-3
"""Share of codes that may round to the other neighbour after a few steps in another order of sums."""

BFLOAT16_STEP = 2.0**-7
"""Relative: a value that lies near the middle between two of bf16 may be rounded either way."""
