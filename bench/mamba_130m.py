# SPDX-License-Identifier: Apache-2.0
"""Takes a random Mamba of 24 × 768 (the shape of mamba-130m) through the whole line, and prints what came out.

    python bench/mamba_130m.py            needs the test extra (transformers) and 3 GB of disk; about 12 minutes

import → quantize to int4 → .onnx and .pte, and a full-precision .onnx → verify → generate → decode and prefill of all
in one run. Lowering to ExecuTorch takes most of the time, and runs in a process of its own, whose peak memory is
printed. The tokenizer is the bundled model's, so that there is one: random weights write nonsense with any.
"""

import contextlib
import io
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from mossquant import bench, export, generate, import_mamba, quantize, verify
from mossquant.checkpoint.locate import asset_folder
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.targets.artifact import Artifact

SIZE = {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280, "state_size": 16}


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        with contextlib.redirect_stderr(io.StringIO()):
            transformers.MambaForCausalLM(transformers.MambaConfig(**SIZE)).to(torch.bfloat16).save_pretrained(
                folder / "hf"
            )
        import_mamba(folder / "hf", folder / "mamba", tokenizer=asset_folder("tiny") / "tokenizer.json")
        quantize(folder / "mamba", folder / "int4", recipe="int4-uniform")
        checkpoint = QuantizedCheckpoint.open(folder / "int4")
        program = export(folder / "int4", folder / "int4-onnx")
        words = [sys.executable, "-m", "mossquant", "export", folder / "int4", "-o", folder / "int4-pte", "--quiet"]
        subprocess.run([*map(str, words), "--target", "executorch"], check=True, capture_output=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        pte = Artifact.open(folder / "int4-pte")
        export(folder / "mamba", folder / "full-onnx")
        read_back = verify(folder / "int4", [folder / "int4-onnx", folder / "int4-pte"], weights_only=True)
        formats: dict[str, int] = {}
        for name, spec in checkpoint.specs.items():
            if spec.site is not None:
                made = checkpoint.quantized(name).format.name if checkpoint.format(name) is not None else "kept"
                formats[made] = formats.get(made, 0) + 1
        entry = checkpoint.plan.by_name["backbone.layers.0.mixer.dt_proj.weight"]
        written = {}
        for name in ("int4-onnx", "int4-pte"):
            written[name] = generate(folder / name, "def main(", max_tokens=16, threads=1).text
        paths = [folder / "full-onnx", folder / "int4-onnx", folder / "int4-pte"]
        timed = bench(paths, threads=1, prompt=128, decode=32, repeats=5)
        full = timed.artifacts[0]
        print(f"parameters {checkpoint.origin.parameters:,}, bits a weight {checkpoint.plan.bits_per_weight:.3f}")
        print(f"linears and embedding by format: {formats}")
        print(f"dt_proj: {entry.columns} columns, stored as {entry.padded_columns}")
        ratio = program.bytes / checkpoint.origin.payload_bytes
        print(f"payload {checkpoint.origin.payload_bytes:,} bytes, .onnx {program.bytes:,}: {ratio:.4f}")
        table = checkpoint.plan.by_name["backbone.embeddings.weight"].predicted_bytes
        with_table = checkpoint.origin.payload_bytes + table
        print(
            f"payload and one copy of the tied table {with_table:,} bytes, .pte {pte.bytes:,}: "
            f"{pte.bytes / with_table:.4f}; peak memory of lowering, Python with its imports included: {peak:.2f} GB"
        )
        print(f"verify: {'passed' if read_back.passed else read_back.failures()}")
        print("generated characters: " + ", ".join(f"{name} {len(text)}" for name, text in written.items()))
        for name in ("decode", "prefill"):
            for path, int4 in zip(paths[1:], timed.artifacts[1:], strict=True):
                a, b = getattr(full, f"{name}_tok_s"), getattr(int4, f"{name}_tok_s")
                print(
                    f"{name}, 1 thread, tokens/s: full precision .onnx {a.median:.1f} ({a.min:.1f}–{a.max:.1f}), "
                    f"{path.name} {b.median:.1f} ({b.min:.1f}–{b.max:.1f}), ratio of medians {b.median / a.median:.2f}"
                )


if __name__ == "__main__":
    main()
