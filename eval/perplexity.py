# SPDX-License-Identifier: Apache-2.0
"""How well a model predicts a text it has not seen.

    nats a token n = mean of −log p(token | everything before it in its stream);   perplexity = exp(n)
    bits a byte = Σ −log p / (ln 2 · bytes of the predicted tokens)                comparable between tokenizers

The text is one stream, or S fixed streams of equal length, with the state carried from a stream's first token to its
last. The first token of each stream is read and not predicted: neither its loss nor its bytes count.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mossquant.eval.open import open_model
from mossquant.eval.passage import held_out_passage
from mossquant.eval.scores import score
from mossquant.eval.windows import WINDOW, Windows
from mossquant.progress import Progress
from mossquant.text.text import Text


@dataclass(frozen=True)
class PerplexityReport:
    """What `perplexity` found.

    Attributes:
        path: what was measured, as given.
        kind: "checkpoint", "quantized checkpoint", or the target of a program.
        activations: activation format that it ran with.
        text: name of the text.
        text_sha256: of the whole text.
        seen: whether the model was trained or calibrated on this text.
        tokens: predicted tokens.
        streams: independent streams; each begins with the initial state.
        nats_per_token: mean loss.
        standard_error: of `nats_per_token`, over windows; None where there is only one.
        window: predicted tokens a window.
        perplexity: exp(nats_per_token).
        bits_per_byte: loss in bits per byte of text; None where token ids were given.
        text_bytes: bytes of the predicted tokens, None likewise.
        special: whether special tokens that the text spells were taken for tokens.
        document_separator: what stood between its documents, None where they were not told apart.
        notes: what the user should know, a sentence each.
    """

    path: str
    kind: str
    activations: str
    text: str
    text_sha256: str
    seen: bool
    tokens: int
    streams: int
    nats_per_token: float
    standard_error: float | None
    window: int
    perplexity: float
    bits_per_byte: float | None
    text_bytes: int | None
    special: bool
    document_separator: str | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What `--json` writes."""
        return {"version": 1, **asdict(self)}


def perplexity(
    model: str | Path,
    *,
    text: str | Path | Text | None = None,
    tokens: int | None = None,
    streams: int = 1,
    activations: str | None = None,
    threads: int | None = None,
    allow_seen: bool = False,
    progress: Progress | None = None,
) -> PerplexityReport:
    """Measure one model, checkpoint or artifact.

    Args:
        model: a PATH argument.
        text: a file or a text; None: the bundled held-out text, for models with the bundled model's tokenizer.
        tokens: only so many tokens from the text's beginning.
        streams: consecutive parts of the text that are run side by side, each from the initial state.
        activations: how a quantized checkpoint is run, "fp32" or "planned".
        threads: CPU threads.
        allow_seen: measure also on text that the model has seen; the report says so.
        progress: told how many tokens are done.

    Raises:
        InputError: bad paths, text or options; see `mossquant.eval.passage`.
    """
    opened = open_model(model, activations=activations, threads=threads)
    passage = held_out_passage([opened], text=text, tokens=tokens, streams_wanted=streams, allow_seen=allow_seen)
    nll = score([opened.runner], passage.tokens, progress=progress)[0].nll
    info = opened.runner.info
    nats = float(nll.mean())
    return PerplexityReport(
        path=info.path,
        kind=info.kind,
        activations=info.activations,
        text=passage.name,
        text_sha256=passage.sha256,
        seen=bool(passage.seen_by),
        tokens=passage.predicted,
        streams=streams,
        nats_per_token=nats,
        standard_error=Windows(*nll.shape).standard_error(nll),
        window=WINDOW,
        perplexity=math.exp(nats),
        bits_per_byte=passage.predicted_bytes and float(nll.sum()) / math.log(2) / passage.predicted_bytes,
        text_bytes=passage.predicted_bytes,
        special=passage.special,
        document_separator=passage.document_separator,
        notes=passage.notes,
    )
