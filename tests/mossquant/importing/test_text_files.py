# SPDX-License-Identifier: Apache-2.0
"""What the files of a Hugging Face folder declare about text: as `transformers` reads it, noted, refused, kept."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from made_tokenizers import SPECIAL, byte_level, save
from mambas import follow, hugging_face, save_hugging_face
from tokenizers import processors
from transformers import AutoTokenizer, MambaForCausalLM

import mossquant
from mossquant.checkpoint.checkpoint import Checkpoint
from mossquant.checkpoint.quantized import QuantizedCheckpoint
from mossquant.errors import InputError
from mossquant.eval.open import open_model
from mossquant.importing.mamba import Imported, import_mamba
from mossquant.text.declared import DeclaredText, read_declared_text

VOCABULARY = 264
UNK, BEGIN, END, START, TURN = (256 + i for i in range(5))
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
Files = Mapping[str, Any]


@pytest.fixture(scope="module")
def source_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = hugging_face({"hidden_size": 32, "num_hidden_layers": 1}, vocab_size=VOCABULARY)
    folder = save_hugging_face(model, tmp_path_factory.mktemp("source") / "hf")
    (folder / "generation_config.json").unlink(missing_ok=True)
    return save(byte_level(), folder)


@pytest.fixture
def source(source_once: Path, tmp_path: Path) -> Path:
    """A folder of which no file names a token."""
    folder = Path(shutil.copytree(source_once, tmp_path / "hf"))
    # A class that names none by itself either, as that of GPT-NeoX does, which transformers takes for a Mamba.
    return write(folder, {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}})


def write(folder: Path, files: Files) -> Path:
    """Change files of a folder: JSON key by key, text whole."""
    for name, change in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(change, str):
            path.write_text(change, newline="")
        else:
            path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | change))
    return folder


def brought_in(source: Path, files: Files, **options: Any) -> tuple[DeclaredText, Imported]:
    out = source.with_name("out")
    done = import_mamba(write(source, files), out, **options)
    return read_declared_text(out, VOCABULARY) or DeclaredText(), done


ENDS: dict[str, tuple[Files, list[int]]] = {
    "two in both configs": (
        {"config.json": {"eos_token_id": [TURN, END]}, "generation_config.json": {"eos_token_id": [TURN, END]}},
        [TURN, END],
    ),
    "only generation_config": ({"generation_config.json": {"eos_token_id": START}}, [START]),
    "generation_config wins": (
        {"config.json": {"eos_token_id": 0}, "generation_config.json": {"eos_token_id": [END, TURN, END]}},
        [END, TURN],
    ),
    "only config": ({"config.json": {"eos_token_id": TURN}}, [TURN]),
}


@pytest.mark.parametrize("name", ENDS)
def test_ends_of_text_are_those_of_transformers(name: str, source: Path) -> None:
    files, wanted = ENDS[name]
    declared, _ = brought_in(source, files)
    assert list(declared.end_of_text) == wanted
    theirs = MambaForCausalLM.from_pretrained(source).generation_config.eos_token_id
    assert set(declared.end_of_text) == set(theirs if isinstance(theirs, list) else [theirs])


NAMES: dict[str, Files] = {
    "names": {
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "bos_token": {"__type": "AddedToken", "content": "<s>"}}
    },
    "a map goes before": {
        "tokenizer_config.json": {"eos_token": "</s>"},
        "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>", "lstrip": False, "rstrip": False}},
    },
    "no map beside added tokens": {
        "tokenizer_config.json": {
            "eos_token": "</s>",
            "added_tokens_decoder": {str(END): {"content": "</s>", "special": True}},
        },
        "special_tokens_map.json": {"eos_token": "<|im_end|>"},
    },
    "tokens of its own": {"tokenizer_config.json": {"image_token": "<unk>", "extra_special_tokens": ["<|im_start|>"]}},
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_tokens_are_those_of_transformers(name: str, source: Path) -> None:
    declared, _ = brought_in(source, NAMES[name])
    theirs = AutoTokenizer.from_pretrained(source)
    assert declared.token_names == dict(theirs.special_tokens_map)
    assert declared.special_tokens == {spelling: 256 + i for i, spelling in enumerate(SPECIAL)}
    assert declared.end_of_text == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))


@pytest.mark.parametrize("put", [True, False], ids=["in front", "not"])
@pytest.mark.parametrize("processor", ["template", "none"])
def test_the_beginning_of_a_text(processor: str, put: bool, source: Path) -> None:
    """By the post-processor as transformers does it; add_bos_token counts where there is none in front."""
    library = byte_level()
    if processor == "none":
        library.post_processor = processors.ByteLevel(trim_offsets=False)
    save(library, source)
    files = {"tokenizer_config.json": {"bos_token": "<s>", "add_bos_token": put}}
    declared, done = brought_in(source, files)
    theirs = AutoTokenizer.from_pretrained(source)("ab").input_ids
    assert declared.beginning_of_text == BEGIN
    assert declared.add_beginning_of_text == (processor == "template" or put)
    contradicts = declared.add_beginning_of_text is not put or (theirs[0] == BEGIN) is not put
    assert any("add_bos_token is" in note for note in done.notes) == contradicts


TEMPLATES: dict[str, Files] = {
    "a text": {"tokenizer_config.json": {"chat_template": TEMPLATE}},
    "named ones": {
        "tokenizer_config.json": {
            "chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
        }
    },
    "a file goes before": {"tokenizer_config.json": {"chat_template": "x"}, "chat_template.jinja": TEMPLATE + "\r\nü"},
    "files": {"chat_template.jinja": TEMPLATE, "additional_chat_templates/rag.jinja": "x"},
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_are_those_of_transformers(name: str, source: Path) -> None:
    declared, done = brought_in(source, TEMPLATES[name])
    assert declared.chat_template == AutoTokenizer.from_pretrained(source).get_chat_template()
    others = {"named ones": "tool_use", "files": "rag"}.get(name)
    assert any("chat templates" in note for note in done.notes) == (others is not None)
    assert others is None or any(note.endswith(f": {others}") for note in done.notes)


GREEDY: dict[str, Files] = {
    "two ends": ENDS["two in both configs"][0],
    "an end in generation_config alone": {"generation_config.json": {"eos_token_id": TURN}},
    "an end of the config": {"config.json": {"eos_token_id": START}},
}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_text_is_that_of_transformers(name: str, source: Path, tmp_path: Path) -> None:
    """A model whose head follows a ring of tokens, after a text that the tokenizer begins with `<s>`."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "tie_word_embeddings": False}
    model = hugging_face(sizes, vocab_size=VOCABULARY)
    ring = [BEGIN, ord("H") - 33, ord("i") - 33, TURN, ord("!") - 33, START, END]  # as byte_level numbers letters
    follow(model, dict(zip(ring, [*ring[1:], ring[0]], strict=True)))
    save_hugging_face(model, source)
    (source / "generation_config.json").unlink()
    brought_in(source, GREEDY[name])
    tokenizer, theirs = AutoTokenizer.from_pretrained(source), MambaForCausalLM.from_pretrained(source)
    prompt = tokenizer("H", return_tensors="pt").input_ids
    assert prompt.tolist() == [[BEGIN, ring[1]]]
    out = theirs.generate(prompt, max_new_tokens=9, do_sample=False)[0, 2:]
    found = mossquant.generate(tmp_path / "out", "H", max_tokens=9)
    assert found.text == tokenizer.decode(out, skip_special_tokens=True)
    assert len(found.tokens) < 9


def test_nothing_declared_writes_nothing(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").unlink()
    import_mamba(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


NOTES: list[tuple[Files, list[str]]] = [
    (
        {
            "generation_config.json": {
                "temperature": 0.7,
                "top_k": 40,
                "do_sample": True,
                "num_beams": 1,
                "pad_token_id": 0,
            }
        },
        ["asks for temperature 0.7, top_k 40, do_sample True, which is not followed (generate has --temperature)"],
    ),
    ({"tokenizer_config.json": {"add_eos_token": True}}, ["behind a text (post-processor or add_eos_token)"]),
    ({"tokenizer_config.json": {"pad_token": "<pad>"}}, ["the tokenizer has not are left out: <pad>"]),
    ({"tokenizer_config.json": {"clean_up_tokenization_spaces": True}}, ["clean_up_tokenization_spaces is not done"]),
    (
        {"config.json": {"eos_token_id": 33}, "tokenizer_config.json": {"eos_token": "</s>"}},
        ["end a text at token [33], and not at the tokenizer's eos_token, which is 258", "token 33 ('B'), which"],
    ),
]


@pytest.mark.parametrize(("files", "notes"), NOTES, ids=[next(iter(next(iter(f.values())))) for f, _ in NOTES])
def test_what_is_not_honoured_is_said(files: Files, notes: list[str], source: Path) -> None:
    _, done = brought_in(source, files)
    assert all(any(note in said for said in done.notes) for note in notes), done.notes
    assert len(done.notes) == len(notes)


def test_what_a_tokenizer_file_asks_for_besides(source: Path) -> None:
    library = byte_level()
    library.enable_padding()
    library.enable_truncation(3)
    added = [("<s>", BEGIN), ("</s>", END), ("<unk>", UNK)]
    template = processors.TemplateProcessing(single="<s> </s> $A <unk>", special_tokens=added)
    library.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    save(library, source)
    declared, done = brought_in(source, {})
    assert not declared.add_beginning_of_text
    for part in ("puts 2 tokens in front", "tokens behind a text", "padding of tokenizer", "truncation of tokenizer"):
        assert any(part in note for note in done.notes)


WRONG: list[tuple[Files, str]] = [
    ({"config.json": {"eos_token_id": VOCABULARY}}, "a vocabulary of 264 has not: 264"),
    ({"generation_config.json": {"eos_token_id": [1, -1]}}, "a vocabulary of 264 has not: -1"),
    (
        {"generation_config.json": {"eos_token_id": "</s>"}},
        "eos_token_id.0: input should be a valid integer",
    ),
    ({"config.json": {"bos_token_id": [1, 2]}}, "bos_token_id: value should have at most 1 item"),
    ({"config.json": {"bos_token_id": True}}, "bos_token_id.0: input should be a valid integer, not True"),
    ({"generation_config.json": "[]"}, "generation_config.json is not a JSON object"),
    ({"tokenizer_config.json": "{"}, "tokenizer_config.json is not JSON"),
    (
        {"tokenizer_config.json": {"chat_template": 3}},
        "tokenizer_config.json is not what a model declares about its text",
    ),
    ({"tokenizer_config.json": {"chat_template": "x" * (1 << 19)}}, "chat_template: string should have at most"),
    ({"tokenizer_config.json": {"added_tokens_decoder": {"9": {"content": "<s>"}}}}, "<s> is 9, not 257"),
    ({"tokenizer_config.json": {"added_tokens_decoder": {"x": 1}}}, "added_tokens_decoder"),
    ({"chat_template.jinja": "\udcff"}, "chat_template.jinja is not UTF-8 at byte 0"),
]


@pytest.mark.parametrize(("files", "message"), WRONG, ids=[str(n) for n in range(len(WRONG))])
def test_what_no_model_declares(files: Files, message: str, source: Path, tmp_path: Path) -> None:
    if files == WRONG[-1][0]:
        (source / "chat_template.jinja").write_bytes(b"\xff")
        files = {}
    with pytest.raises(InputError) as error:
        brought_in(source, files)
    assert message in str(error.value)
    assert str(error.value).isprintable()
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_checked_against_what_is_declared(source: Path, tmp_path: Path) -> None:
    declared, _ = brought_in(source, {"config.json": {"eos_token_id": TURN}})
    library = byte_level()
    library.add_special_tokens(["<tool>"])
    other = save(library, tmp_path / "other") / "tokenizer.json"
    import_mamba(tmp_path / "out", tmp_path / "again", tokenizer=other)
    assert read_declared_text(tmp_path / "again", VOCABULARY) == declared, "a MossNet's text.json is taken along"
    changed = other.read_text().replace("<|im_end|>", "<|end|>")
    other.write_text(changed)
    with pytest.raises(InputError, match=r"text\.json names special tokens that tokenizer\.json has elsewhere"):
        import_mamba(tmp_path / "out", tmp_path / "none", tokenizer=other)


def test_it_goes_along_to_programs_and_belongs_to_no_hash(source: Path, tmp_path: Path) -> None:
    files = {"config.json": {"eos_token_id": [TURN, END]}, "tokenizer_config.json": {"chat_template": TEMPLATE}}
    declared, _ = brought_in(source, files)
    shutil.copytree(tmp_path / "out", tmp_path / "without", ignore=shutil.ignore_patterns("text.json"))
    for name in ("out", "without"):
        mossquant.quantize(tmp_path / name, tmp_path / f"{name}-int4", recipe="int4-uniform")
        mossquant.export(tmp_path / f"{name}-int4", tmp_path / f"{name}-onnx")
    text = (tmp_path / "out" / "text.json").read_bytes()
    assert all((tmp_path / name / "text.json").read_bytes() == text for name in ("out-int4", "out-onnx"))
    origins = [Checkpoint.open(tmp_path / name).origin for name in ("out", "without")]
    assert origins[0].files == origins[1].files
    quantized = [QuantizedCheckpoint.open(tmp_path / f"{name}-int4") for name in ("out", "without")]
    assert quantized[0].origin.files == quantized[1].origin.files
    assert ("text.json" in quantized[0].manifest.files, "text.json" in quantized[1].manifest.files) == (True, False)
    for name in ("out", "out-int4", "out-onnx"):
        facts = dict(mossquant.info(tmp_path / name).facts)
        assert facts["end of text"] == f"{TURN} <|im_end|>, {END} </s>"
        assert facts["beginning of text"] == f"{BEGIN} <s>, put in front of a text"
        assert facts["chat template"] == f"{len(TEMPLATE)} characters of Jinja"
    assert "end of text" not in dict(mossquant.info(tmp_path / "without-onnx").facts)
    assert b'"text"' not in (tmp_path / "without-onnx" / "model.onnx").read_bytes()
    program = (tmp_path / "out-onnx" / "model.onnx").read_bytes()
    assert b'"text":' + declared.model_dump_json().encode() in program


def test_a_text_json_of_another_model_is_refused(source: Path, tmp_path: Path) -> None:
    declared, _ = brought_in(source, {"config.json": {"eos_token_id": TURN}})
    mossquant.export(tmp_path / "out", tmp_path / "artifact")
    path, program = tmp_path / "artifact" / "text.json", tmp_path / "artifact" / "model.onnx"
    text = path.read_text()
    assert open_model(program).tokenizer.declared == declared
    path.write_text(text.replace(str(TURN), str(END), 1))
    with pytest.raises(InputError, match=r"text\.json is not what model\.onnx was exported with"):
        open_model(program)
    path.unlink()
    opened = open_model(program)
    with pytest.raises(InputError, match=r"has no text\.json, and model\.onnx was exported with one: copy it there"):
        opened.tokenizer  # noqa: B018
    mossquant.quantize(tmp_path / "out", tmp_path / "int4", recipe="int4-uniform")
    (tmp_path / "int4" / "text.json").write_text(text.replace(str(TURN), str(END), 1))
    with pytest.raises(InputError, match=r"text\.json has another SHA-256 than the manifest says"):
        QuantizedCheckpoint.open(tmp_path / "int4")


@pytest.mark.parametrize("named", [True, False], ids=["class named", "no class"])
def test_sentencepiece_alone(named: bool, source: Path, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (source / "tokenizer.json").unlink()
    (tmp_path / "words.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    trained = {"vocab_size": 60, "model_type": "bpe", "minloglevel": 2, "normalization_rule_name": "identity"}
    prefix = str(source / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "words.txt"), model_prefix=prefix, **trained)
    names = source / "tokenizer_config.json"
    names.write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} if named else {}))
    _, done = brought_in(source, {})
    assert (tmp_path / "out" / "tokenizer.json").is_file() == named
    if not named:
        assert any("tokenizer.model (SentencePiece) is not converted" in note for note in done.notes)
        return
    assert any("tokenizer.model was converted by transformers as LlamaTokenizer" in note for note in done.notes)
    theirs = AutoTokenizer.from_pretrained(source)
    ours = open_model(tmp_path / "out").tokenizer
    for text in ("the fox", "the  lazy dog jumps"):
        assert ours.encode(text).tolist() == theirs(text, add_special_tokens=False).input_ids
