# SPDX-License-Identifier: Apache-2.0
"""`train` from text files to a checkpoint: the same bytes whether or not it was killed on the way."""

import hashlib
import shutil
from pathlib import Path

import pytest

from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.errors import InputError
from mossquant.model import config as configs
from mossquant.model.config import MossNetConfig
from mossquant.training.train import train
from mossquant.training.trainer import Schedule, TrainingStep

SMALL = MossNetConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, time_step_rank=5)
SCHEDULE = Schedule(steps=4, batch=2, window=8, warmup=1)


@pytest.fixture(autouse=True)
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configs.PRESETS, "tiny", SMALL)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} holds the number {i * i % 97}\n" for i in range(400)))
    return str(path)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_and_gives_the_same_bytes(text: str, tmp_path: Path) -> None:
    train("tiny", [text], tmp_path / "whole", schedule=SCHEDULE)

    def kill(progress: TrainingStep) -> None:
        if progress.step == 3:
            raise Killed

    with pytest.raises(Killed):
        train("tiny", [text], tmp_path / "broken", schedule=SCHEDULE, snapshot_every=1, shown=kill)
    assert not (tmp_path / "broken").exists()
    said: list[str] = []
    train("tiny", [text], tmp_path / "broken", schedule=SCHEDULE, said=said.append)
    assert any("going on from step 2" in line for line in said)
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")


def test_the_checkpoint_says_what_it_has_seen(text: str, tmp_path: Path) -> None:
    trained = train("tiny", [text], tmp_path / "out", schedule=SCHEDULE)
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.torch_dtype == "bfloat16"
    assert checkpoint.origin.training_text == (hashlib.sha256(Path(text).read_bytes()).hexdigest(),)
    assert checkpoint.origin.tokenizer is not None
    assert trained.tokens == 4 * 2 * 8


def test_a_byte_level_model_needs_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "binary"
    path.write_bytes(bytes(range(256)) * 8)
    train("tiny", [str(path)], tmp_path / "out", tokenizer="bytes", schedule=SCHEDULE)
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.config.vocab_size == 256
    assert checkpoint.origin.tokenizer is None


@pytest.mark.parametrize(
    ("preset", "content", "message"),
    [
        ("huge", b"text" * 1000, "unknown preset 'huge'; known presets: tiny"),
        ("tiny", b"", "is empty"),
        ("tiny", b"\xff\xfe" * 4000, "not UTF-8|UTF-8"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    preset: str, content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        train(preset, [str(path)], tmp_path / "out", schedule=SCHEDULE)
    assert not (tmp_path / "out").exists()


def test_a_damaged_work_folder_is_said_and_left_as_it_is(text: str, tmp_path: Path) -> None:
    train("tiny", [text], tmp_path / "out", schedule=SCHEDULE)
    work = tmp_path / "out.training"
    snapshot = next(work.glob("snapshot*"))
    data, before = snapshot.read_bytes(), sorted(work.iterdir())
    snapshot.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="is not a training snapshot"):
        train("tiny", [text], tmp_path / "again", schedule=SCHEDULE, work=work)
    assert sorted(work.iterdir()) == before
    snapshot.write_bytes(data)
    train("tiny", [text], tmp_path / "again", schedule=SCHEDULE, work=work)
    assert digests(tmp_path / "again") == digests(tmp_path / "out")


def test_what_others_write_beside_a_work_folder_stays(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("ab " * 4000)
    with pytest.raises(InputError):
        train(
            "tiny",
            [str(path)],
            tmp_path / "out",
            schedule=SCHEDULE,
            work=tmp_path / "deep" / "work",
            said=lambda line: (tmp_path / "deep" / "precious").write_text("mine"),
        )
    assert [each.name for each in (tmp_path / "deep").iterdir()] == ["precious"]


def test_a_checkpoint_is_no_work_folder(text: str, tmp_path: Path, checkpoint_folder: Path) -> None:
    work = Path(shutil.copytree(checkpoint_folder, tmp_path / "work"))
    with pytest.raises(InputError, match="lies in a checkpoint or artifact"):
        train("tiny", [text], tmp_path / "out", schedule=SCHEDULE, work=work)


def test_a_work_folder_that_was_made_in_vain_is_removed(tmp_path: Path) -> None:
    """Enough bytes for a step, too few different ones for a vocabulary: found out only when the work has begun."""
    path = tmp_path / "text.txt"
    path.write_text("aaaa bbbb " * 40)
    with pytest.raises(InputError, match="entries"):
        train("tiny", [str(path)], tmp_path / "out", schedule=SCHEDULE, work=tmp_path / "deep" / "work")
    assert [left.name for left in tmp_path.iterdir()] == ["text.txt"]
