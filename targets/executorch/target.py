# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch as a target: a .pte with its linears delegated to XNNPACK, which computes all experts of both kinds."""

from mossquant.targets.target import Target

TARGET = Target("executorch", runtime="executorch", computes_all=("ssm", "mlp"))
