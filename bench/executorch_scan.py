# SPDX-License-Identifier: Apache-2.0
"""Times the forms in which ExecuTorch can run the selective scan, and says which is the fastest at each length.

    python bench/executorch_scan.py [--width 512] [--rounds 20]

Each form is a program of its own for one length: x, Δ [T, E], B, C [T, N] and the state in, y and the state out, with
XNNPACK for what it takes. Wall time, one thread; the forms of a length take turns, and the median and range of all
rounds but the first are printed, with the largest difference from a float64 loop. Letters as in `mossquant.model`.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mossquant.eval.machine import machine
from mossquant.targets.executorch.packages import load_method, load_program, set_threads
from mossquant.targets.executorch.scan import loop, step
from mossquant.targets.program import Scan

STATES = 16
LENGTHS = (1, 16, 128, 1024)
UNROLLED_AT_MOST = 16


def unrolled(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Every token's step in the graph."""
    parts = []
    for t in range(x.shape[0]):
        y, h = step(x[t : t + 1], dt[t : t + 1], A, B[t : t + 1], C[t : t + 1], h)
        parts.append(y)
    return torch.cat(parts), h


def doubling(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """log2(T) passes over all tokens (Hillis & Steele 1986): only decays are multiplied, so that nothing overflows."""
    E, N = A.shape
    T = x.shape[0]
    decay = torch.exp(dt.view(T, E, 1) * A)
    state = (dt * x).view(T, E, 1) * B.view(T, 1, N)
    state = torch.cat([state[:1] + decay[:1] * h, state[1:]])
    reach = 1
    while reach < T:
        state = torch.cat([state[:reach], state[reach:] + decay[reach:] * state[:-reach]])
        decay = torch.cat([decay[:reach], decay[reach:] * decay[:-reach]])
        reach *= 2
    return torch.bmm(state, C.view(T, N, 1)).view(T, E), state[-1]


def loop_inside(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """A loop that computes decays and outputs itself: no array of T · E · N values, and no delegate."""
    from torch._higher_order_ops.scan import scan

    def body(carried: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        delta, added, b, c = token
        after = torch.exp(delta.unsqueeze(-1) * A) * carried + added.unsqueeze(-1) * b.unsqueeze(0)
        return after, (after * c.unsqueeze(0)).sum(-1)

    last, y = scan(body, h, (dt, dt * x, B, C))
    return y, last


FORMS: dict[str, Scan] = {
    "step": step,
    "unrolled": unrolled,
    "doubling": doubling,
    "loop": loop,
    "loop, all inside": loop_inside,
}


def applies(name: str, length: int) -> bool:
    """A step is one token; a loop over one token is none."""
    if name in ("step", "doubling", "unrolled"):
        return (length == 1) == (name == "step") and (name != "unrolled" or length <= UNROLLED_AT_MOST)
    return length > 1


class Program(nn.Module):
    """One form."""

    A: Tensor

    def __init__(self, form: Scan, A: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A)
        self.form = form

    def forward(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.form(x, dt, self.A, B, C, h)


def lowered(form: Scan, A: Tensor, inputs: tuple[Tensor, ...], path: Path) -> Callable[[list[Tensor]], list[Tensor]]:
    """The form as a loaded method."""
    torch._dynamo.reset()
    with torch.no_grad():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        exported = torch.export.export(Program(form, A), inputs, strict=False)
        edge = to_edge_transform_and_lower(
            {"forward": exported},
            partitioner={"forward": [XnnpackPartitioner()]},
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        with path.open("wb") as file:
            edge.to_executorch().write_to_file(file)
    program = load_program(path)
    method = load_method(program, "forward")
    return lambda arrays, keep=program: method(arrays)  # type: ignore[misc]


def expected(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> Tensor:
    """y [T, E] by a loop in float64."""
    x, dt, A, B, C, h = (value.double() for value in (x, dt, A, B, C, h))
    rows = []
    for t in range(x.shape[0]):
        h = torch.exp(dt[t, :, None] * A) * h + (dt[t] * x[t])[:, None] * B[t]
        rows.append(h @ C[t])
    return torch.stack(rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=20)
    asked = parser.parse_args()
    set_threads(1)
    torch.manual_seed(0)
    A = -torch.arange(1, STATES + 1).float().expand(asked.width, STATES).contiguous()
    print(f"E = {asked.width}, N = {STATES}\n")
    print("| T | form | µs a token, median (range) | largest difference | bytes of the program |")
    print("| ---: | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as place:
        for length in LENGTHS:
            x, dt = torch.randn(length, asked.width), torch.rand(length, asked.width) * 0.1
            B, C, h = torch.randn(length, STATES), torch.randn(length, STATES), torch.randn(asked.width, STATES)
            names = [name for name in FORMS if applies(name, length)]
            paths = {name: Path(place) / f"{name}-{length}.pte" for name in names}
            methods = {name: lowered(FORMS[name], A, (x, dt, B, C, h), paths[name]) for name in names}
            times: dict[str, list[float]] = {name: [] for name in names}
            exact = expected(x, dt, A, B, C, h)
            for _ in range(asked.rounds + 1):
                for name in names:
                    start = time.perf_counter()
                    methods[name]([x, dt, B, C, h])
                    times[name].append(1e6 * (time.perf_counter() - start) / length)
            for name in names:
                error = float((methods[name]([x, dt, B, C, h])[0].double() - exact).abs().max() / exact.abs().max())
                counted = times[name][1:]
                print(
                    f"| {length} | {name} | {np.median(counted):,.1f} ({min(counted):,.1f}–{max(counted):,.1f}) "
                    f"| {error:.1e} | {paths[name].stat().st_size:,} |",
                    flush=True,
                )
    print("\n" + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine().items()))


if __name__ == "__main__":
    main()
