# SPDX-License-Identifier: Apache-2.0
"""Files that an earlier commit wrote, as `tests/fixtures/94c55b8/README.md` says: no test has to lower them."""

from pathlib import Path

KEPT = Path(__file__).parent / "fixtures" / "94c55b8"
"""checkpoint, int4, artifact."""
KEPT_ONNX, KEPT_PTE = KEPT / "artifact" / "model.onnx", KEPT / "artifact" / "model.pte"
