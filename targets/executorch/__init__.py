# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch: one .pte with prefill, score and decode, its linears delegated to XNNPACK; and a Runner of it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mossquant.targets.executorch.runner import ExecutorchRunner

__all__ = ["ExecutorchRunner"]


def __getattr__(name: str) -> Any:
    """The Runner, when it is asked for: a child process that only reads a program loads no PyTorch."""
    if name != "ExecutorchRunner":
        raise AttributeError(name)
    from mossquant.targets.executorch.runner import ExecutorchRunner

    return ExecutorchRunner
