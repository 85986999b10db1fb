# SPDX-License-Identifier: Apache-2.0
"""`python -m mossquant` is the `mossquant` command."""

from mossquant.cli.main import run

run()
