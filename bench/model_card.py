# SPDX-License-Identifier: Apache-2.0
"""Writes the card of the bundled checkpoint, `mossquant/assets/tiny/README.md`, from measurements on its held-out text.

    python bench/model_card.py            about 6 minutes on two cores

Measured: bits per byte against `xz -9e` on the same text; how evenly the routers spread the tokens; what it costs to
choose experts at random; what it costs to remove each expert (its router logit is set to −∞, so that the next best
expert takes its place). The model is the stored one, computed in fp32, in one stream with the state carried.
"""

import json
import lzma
import math
import platform
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mossquant.checkpoint.checkpoint import Checkpoint, load_model
from mossquant.checkpoint.locate import asset_folder
from mossquant.files.outputs import file_sha256
from mossquant.model.forward import Forward, Reroute
from mossquant.model.mossnet import MossNet, parameter_count
from mossquant.model.routing import Routing
from mossquant.release import release
from mossquant.text.text import Tokenizer, bundled_text

OUTPUT = Path(__file__).resolve().parent.parent / "mossquant" / "assets" / "tiny" / "README.md"
CHUNK = 512
ABLATION_TOKENS = 32768
SMALL_COST = 1e-3


def losses(model: MossNet, tokens: Tensor, reroute: Reroute | None = None) -> np.ndarray:
    """Nats of each token after the first, in one stream."""
    run = Forward(scan="kernel", reroute=reroute)
    state = model.initial_state(1)
    out = []
    with torch.inference_mode():
        for start in range(0, len(tokens) - 1, CHUNK):
            chunk = tokens[start : start + CHUNK + 1]
            logits, state = model(chunk[None, :-1], state, run=run)
            log_p = torch.log_softmax(logits[0].double(), -1)
            out.append(-log_p.gather(1, chunk[1:, None])[:, 0].numpy())
    return np.concatenate(out)


def counting(counts: dict[str, np.ndarray]) -> Reroute:
    """Counts choices per expert and changes nothing."""

    def count(name: str, routing: Routing) -> Routing:
        found = torch.bincount(routing.chosen.flatten(), minlength=routing.experts).numpy()
        counts[name] = counts.get(name, 0) + found
        return routing

    return count


def at_random(seed: int, kind: str) -> Reroute:
    """Replaces a kind's choices by experts drawn uniformly; gates are the softmax over their true logits."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, routing: Routing) -> Routing:
        if routing.logits is None or kind not in name:
            return routing
        chosen = torch.rand(routing.logits.shape, generator=generator).topk(routing.chosen.shape[1], -1).indices
        return Routing(routing.logits, chosen, torch.softmax(routing.logits.gather(1, chosen), -1), routing.experts)

    return draw


def without(router: str, expert: int) -> Reroute:
    """Removes one expert: the others compete for its tokens."""

    def remove(name: str, routing: Routing) -> Routing:
        if name != router or routing.logits is None:
            return routing
        logits = routing.logits.clone()
        logits[:, expert] = -math.inf
        values, chosen = logits.topk(routing.chosen.shape[1], -1)
        return Routing(logits, chosen, torch.softmax(values, -1), routing.experts)

    return remove


def main() -> None:
    folder = asset_folder("tiny")
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.config
    model = load_model(checkpoint)
    text = bundled_text("heldout")
    tokenizer = Tokenizer.for_folder(folder, config.vocab_size)
    ids, lengths = tokenizer.encode_with_lengths(text.data)
    tokens = torch.from_numpy(ids)
    split = json.loads((asset_folder("text") / "split.json").read_text())
    record = json.loads((folder / "training.json").read_text())

    counts: dict[str, np.ndarray] = {}
    whole = losses(model, tokens, counting(counts))
    bits = whole.sum() / math.log(2) / lengths[1:].sum()
    xz = 8 * len(lzma.compress(text.data, preset=9 | lzma.PRESET_EXTREME)) / len(text.data)

    part = tokens[: ABLATION_TOKENS + 1]
    base = losses(model, part).mean()
    random_cost = {kind: losses(model, part, at_random(0, kind)).mean() - base for kind in ("mixer", "mlp", "")}
    removed: dict[str, list[str]] = {}
    for name, count in sorted(counts.items()):
        removed[name] = []
        for e in range(len(count)):
            cost, mark = losses(model, part, without(name, e)).mean() - base, ""
            if cost < SMALL_COST:
                cost, mark = losses(model, tokens, without(name, e)).mean() - whole.mean(), " *"
            removed[name].append(f"{cost:+.5f}{mark}")

    lines = [
        "# tiny: the bundled MossNet",
        "",
        f"A MossNet of {parameter_count(config):,} parameters for demonstration and tests, trained by this project on "
        "the source of Python's standard library. It writes plausible Python and knows nothing else.",
        "",
        "| | |",
        "| --- | --- |",
        f"| shape | {config.num_hidden_layers} blocks, width {config.hidden_size}, d_inner {config.d_inner}, state "
        f"{config.state_size}, dt_rank {config.time_step_rank}, {config.ssm_experts(0)} SSM experts top-"
        f"{config.ssm_chosen(0)}, {config.mlp_experts(0)} MLP experts top-{config.mlp_chosen(0)} of width "
        f"{config.mlp_intermediate_size}, vocabulary {config.vocab_size} (BPE) |",
        f"| stored | {checkpoint.torch_dtype}, {checkpoint.origin.payload_bytes:,} bytes, sha256 "
        f"`{file_sha256(folder / 'model.safetensors')}` |",
        f"| tokenizer | sha256 `{tokenizer.sha256}` |",
        f"| trained with | `mossquant train --preset tiny --text python-stdlib --steps {record['schedule']['steps']} "
        f"-o tiny` |",
        f"| on | {record['text'][0]['bytes']:,} bytes of Python {record['python']}'s standard library with its tests, "
        f"sha256 `{record['text'][0]['sha256']}`: {record['tokens_in_text']:,} tokens, of which "
        f"{record['tokens_seen']:,} were seen ({record['tokens_seen'] / record['tokens_in_text']:.1f} epochs) |",
        f"| by | PyTorch {record['torch']} on {record['device']}; batch {record['schedule']['batch']} × "
        f"{record['schedule']['window']}, AdamW, peak learning rate {record['schedule']['peak_lr']}, cosine; last loss "
        f"{record['last_loss_nats_per_token']} nats a token on the training text |",
        "| licence | weights Apache-2.0; the text is the Python Software Foundation's (PSF-2.0), see "
        "`LICENSE-python.txt` beside the texts |",
        "",
        "## The texts",
        "",
        f"Held out before training: {len(split['heldout']['modules'])} modules, {split['heldout']['bytes']:,} bytes, "
        f"for evaluation (sha256 `{split['heldout']['sha256']}`), and {len(split['calibration']['modules'])} modules, "
        f"{split['calibration']['bytes']:,} bytes, for calibration. {len(split['dropped'])} more modules were left out "
        "of both because more than 5 % of their 50-character windows also occur in the training text. "
        f"The largest share left in a held-out module is {100 * largest_share(split):.1f} %, "
        f"by size {100 * weighted_share(split):.2f} %. Every module with its share is in "
        "`mossquant/assets/text/split.json`; `python bench/split_stdlib.py` makes it.",
        "",
        "## Measured on the held-out text",
        "",
        f"By `python bench/model_card.py` with mossquant {release()}, PyTorch {torch.__version__}, "
        f"{platform.machine()}; one stream, {len(whole):,} predicted tokens.",
        "",
        "| measure | value |",
        "| --- | ---: |",
        f"| loss | {whole.mean():.4f} nats a token |",
        f"| perplexity | {math.exp(whole.mean()):.3f} |",
        f"| bits per byte | {bits:.4f} |",
        f"| `xz -9e` of the same text | {xz:.4f} bits per byte |",
        f"| ratio | {bits / xz:.3f} |",
        f"| smallest share of an expert | {min(c.min() / c.mean() for c in counts.values()):.2f} of a fair share |",
        f"| SSM experts drawn at random | +{random_cost['mixer']:.3f} nats a token |",
        f"| MLP experts drawn at random | +{random_cost['mlp']:.3f} nats a token |",
        f"| both drawn at random | +{random_cost['']:.3f} nats a token |",
        "",
        f"Each expert: its share of the choices (1 is fair), and what removing it costs in nats a token on the first "
        f"{ABLATION_TOKENS:,} tokens; where that is less than {SMALL_COST} it is measured again on the whole text (*).",
        "",
        "| router | " + " | ".join(f"expert {e}" for e in range(config.ssm_experts(0))) + " |",
        "| --- |" + " ---: |" * config.ssm_experts(0),
    ]
    for name, costs in removed.items():
        count = counts[name]
        cells = [f"{c / count.mean():.2f}, {cost}" for c, cost in zip(count, costs, strict=True)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    OUTPUT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def largest_share(split: dict) -> float:
    """The largest share of a held-out module's windows that also occur in the training text."""
    return max(module["shared_share"] for module in split["heldout"]["modules"])


def weighted_share(split: dict) -> float:
    """Share of the held-out windows that also occur in the training text, over all modules."""
    modules = split["heldout"]["modules"]
    return sum(m["shared_share"] * m["bytes"] for m in modules) / sum(m["bytes"] for m in modules)


if __name__ == "__main__":
    main()
