# SPDX-License-Identifier: Apache-2.0
"""Writes the head of `docs/performance.md`: every runtime at int4, side by side, and where a token's time goes.

    python bench/performance.py [--repeats 7] [--threads 1] [--folder FOLDER]     about 15 minutes on two idle cores

Lowering takes most of the time; with --folder what was made is kept there and used again.

Models: the bundled one, and a random Mamba of 24 × 768 (speed does not depend on the values). Each runtime runs in a
process of its own, all take turns (`mossquant bench --profile`). Sections of the page that other commands wrote stay.
"""

import argparse
import tempfile
from pathlib import Path

from page import joined, parted
from peers import make_checkpoint
from peers_llama import made

from mossquant import bench, export, quantize
from mossquant.eval.bench import BenchReport, Speed, Timing
from mossquant.model.config import preset
from mossquant.release import release

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
TIMES = "Where the time goes"
PROMPTS = (128, 512)
MODELS = {"tiny": "tiny", "Mamba 24 × 768": "mamba-130m"}
RUNTIMES = {
    "checkpoint": "PyTorch, fp32 activations",
    "app/model.onnx": ".onnx",
    "app/model.pte": ".pte, stock kernels",
    "kernels": ".pte, our kernels",
    "app/model.moss": ".moss",
}


def make(folder: Path, name: str) -> None:
    """A model in int4-uniform and its artifacts; what is there already is kept."""
    source: str | Path = MODELS[name]
    if name != "tiny":
        source = made(folder / "full", lambda path: make_checkpoint(preset(MODELS[name]), path))
    codes = made(folder / "checkpoint", lambda path: quantize(source, path, recipe="int4-uniform"))
    made(folder / "app", lambda path: export(codes, path, target=["onnx", "executorch", "native"]))
    made(folder / "kernels", lambda path: export(codes, path, target="executorch", kernels="mossquant"))


def file_bytes(path: Path) -> int:
    """Of a program, or of a checkpoint's tensors."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.suffix in (".safetensors", ".pte")]
    return sum(file.stat().st_size for file in files)


def said(value: Speed) -> str:
    """Median and range."""
    return f"{value.median:,.0f} ({value.min:,.0f}–{value.max:,.0f})"


def speeds(name: str, reports: dict[int, BenchReport]) -> list[str]:
    """A row for each runtime."""
    rows = []
    for index, runtime in enumerate(RUNTIMES.values()):
        timings = [reports[prompt].artifacts[index] for prompt in PROMPTS]
        prefill = " | ".join(said(timing.prefill_tok_s) for timing in timings)
        last = timings[-1]
        size = f"{file_bytes(Path(last.path)) / 1e6:,.1f}"
        rows.append(f"| {name} | {runtime} | {said(last.decode_tok_s)} | {prefill} | {last.load_ms:,.0f} | {size} |")
    return rows


def times(name: str, timing: Timing) -> list[str]:
    """µs of a token by part of the model, the largest of decode first, and what is left to the limit."""
    whole = {"prefill": sum(timing.prefill_us.values()), "decode": sum(timing.decode_us.values())}
    rows = [f"| {name}, .moss: µs a token | decode | of it | prefill of {PROMPTS[-1]} | of it |"]
    rows += ["| --- | ---: | ---: | ---: | ---: |"]
    for part, spent in sorted(timing.decode_us.items(), key=lambda of: -of[1]):
        prefill = timing.prefill_us.get(part, 0.0)
        shares = f"{100 * spent / whole['decode']:.0f} % | {prefill:,.1f} | {100 * prefill / whole['prefill']:.0f} %"
        rows.append(f"| {part} | {spent:,.1f} | {shares} |")
    assert timing.read_gb_s is not None
    least = timing.bytes_per_token / timing.read_gb_s.median / 1e3
    said_limit = (
        f"A step of the decode reads {timing.bytes_per_token / 1e6:,.1f} MB of weights; read alone, at "
        f"{timing.read_gb_s.median:.1f} GB/s of the same mapping, they take {least:,.0f} of its "
        f"{1e6 / timing.decode_tok_s.median:,.0f} µs."
    )
    return ["", *rows, "", said_limit]


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    rows = [
        "| model, int4-uniform | runtime | decode, tokens/s | prefill of 128 | prefill of 512 | load, ms | file, MB |"
    ]
    rows += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    parts = []
    with tempfile.TemporaryDirectory() as place:
        for name in MODELS:
            folder = (asked.folder or Path(place)) / MODELS[name]
            folder.mkdir(parents=True, exist_ok=True)
            make(folder, name)
            paths = [folder / runtime for runtime in RUNTIMES]
            reports = {
                prompt: bench(
                    paths, threads=asked.threads, prompt=prompt, decode=64, repeats=asked.repeats, profile=True
                )
                for prompt in PROMPTS
            }
            rows += speeds(name, reports)
            parts += times(name, reports[PROMPTS[-1]].artifacts[-1])
    described = reports[PROMPTS[-1]].machine
    lines = [
        "# Performance",
        "",
        f"Written by `python bench/performance.py --threads {asked.threads}` with mossquant {release()} on "
        f"{described['cpu']}, {described['cores']} cores; torch {described['torch']}, onnxruntime "
        f"{described['onnxruntime']}, executorch {described['executorch']}. One run: the runtimes of a model take "
        f"turns, each in a process of its own; median and range of {asked.repeats} turns. Ratios hold for this machine "
        "alone; no phone was measured.",
        "",
        *rows,
        "",
    ]
    _, sections = parted(OUTPUT.read_text("utf-8") if OUTPUT.exists() else "")
    own = {TIMES: "\n".join([TIMES, *parts])}
    OUTPUT.write_text(joined("\n".join(lines).rstrip(), own | sections | own), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
