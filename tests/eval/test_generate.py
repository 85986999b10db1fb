# SPDX-License-Identifier: Apache-2.0
"""Generation with scripted models: stop strings across tokens, characters across tokens, ends, draws."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from made_tokenizers import byte_level, save
from numpy.typing import NDArray
from scripted import Scripted

from mossquant.checkpoint.locate import BUNDLED, asset_folder
from mossquant.errors import InputError
from mossquant.eval.generate import Generation, continue_text, generate, sample
from mossquant.eval.open import open_runner
from mossquant.importing.mamba import import_mamba
from mossquant.runner import State
from mossquant.text.declared import DeclaredText
from mossquant.text.text import Tokenizer


def _run(script: bytes, **options: object) -> tuple[Generation, list[str]]:
    pieces: list[str] = []
    found = continue_text(
        Scripted(script),  # type: ignore[arg-type]
        Tokenizer.byte_level(),
        "prompt",
        on_text=pieces.append,
        **options,  # type: ignore[arg-type]
    )
    assert "".join(pieces) == found.text
    return found, pieces


def test_greedy_follows_the_logits_and_streams() -> None:
    found, pieces = _run(b"hello world", max_tokens=5)
    assert (found.text, found.reason, found.prompt_tokens) == ("hello", "max_tokens", 6)
    assert pieces == list("hello")
    assert found.tokens == tuple(b"hello")


def test_the_model_reads_the_prompt_and_what_it_wrote_but_not_the_last_token() -> None:
    runner = Scripted(b"abc")
    continue_text(runner, Tokenizer.byte_level(), "xy", max_tokens=3)  # type: ignore[arg-type]
    assert runner.read_tokens == list(b"xyab")


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (("lo",), "hel", "stop"),
        (("lo w", "wor"), "hel", "stop"),
        (("x", "lx"), "hello world", "max_tokens"),
        (("o wx", "ld"), "hello wor", "stop"),
        (("hello",), "", "stop"),
        (("d!",), "hello world", "max_tokens"),
    ],
)
def test_stop_strings_across_tokens(stop: tuple[str, ...], text: str, reason: str) -> None:
    found, pieces = _run(b"hello world", max_tokens=11, stop=stop)
    assert (found.text, found.reason) == (text, reason)
    assert all(pieces)


def test_what_might_begin_a_stop_string_is_held_back_and_then_given() -> None:
    seen: list[str] = []
    script = Scripted(b"aab.")
    continue_text(script, Tokenizer.byte_level(), "p", max_tokens=4, stop=("aac",), on_text=seen.append)  # type: ignore[arg-type]
    assert seen == ["aab", "."]


def test_characters_are_given_whole() -> None:
    found, pieces = _run("größe".encode(), max_tokens=7)
    assert pieces == list("größe")
    assert len(found.tokens) == 7


def test_bytes_that_never_become_a_character() -> None:
    found, _ = _run("aé".encode()[:2], max_tokens=2)
    assert found.text == "a\ufffd"


def test_end_of_text_ends() -> None:
    tokenizer = Tokenizer.from_file(asset_folder(BUNDLED) / "tokenizer.json")
    assert tokenizer.end_of_text is not None
    word = tokenizer.encode("import").tolist()
    runner = Scripted([*word, tokenizer.end_of_text, *word], vocab_size=4096)
    found = continue_text(runner, tokenizer, "x", max_tokens=50)  # type: ignore[arg-type]
    assert (found.text, found.reason) == ("import", "end_of_text")
    assert found.tokens[-1] == tokenizer.end_of_text


def test_an_empty_prompt_begins_a_new_text() -> None:
    tokenizer = Tokenizer.from_file(asset_folder(BUNDLED) / "tokenizer.json")
    runner = Scripted([5], vocab_size=4096)
    continue_text(runner, tokenizer, "", max_tokens=1)  # type: ignore[arg-type]
    assert runner.read_tokens == [tokenizer.end_of_text]
    with pytest.raises(InputError, match="prompt is empty"):
        continue_text(Scripted([5]), Tokenizer.byte_level(), "", max_tokens=1)  # type: ignore[arg-type]


LETTERS = Tokenizer(byte_level(), None)
END, BEGIN, START, STOP = (LETTERS.special_tokens[name] for name in ("</s>", "<s>", "<|im_start|>", "<|im_end|>"))


def _said(script: Sequence[int], prompt: str = "p", tokenizer: Tokenizer = LETTERS, **options: object) -> Generation:
    """With a tokenizer of letters and special tokens; what comes piece by piece is the text."""
    pieces: list[str] = []
    runner = Scripted(script, vocab_size=261)
    found = continue_text(runner, tokenizer, prompt, on_text=pieces.append, **options)  # type: ignore[arg-type]
    assert "".join(pieces) == found.text
    assert found.prompt_tokens == len(runner.read_tokens) - len(found.tokens) + 1
    return found


def _ids(text: str) -> list[int]:
    return LETTERS.encode(text, special=True).tolist()


def test_special_tokens_in_a_prompt_are_letters_unless_asked_for() -> None:
    assert _said(_ids("a</s>"), "<s>x").prompt_tokens == 4
    assert _said(_ids("a</s>"), "<s>x").notes == (
        "the prompt spells <s>, taken as letters; --special takes them for tokens",
    )
    found = _said(_ids("a</s>"), "<s>x", special=True)
    assert (found.prompt_tokens, found.text, found.notes) == (2, "a", ())


@pytest.mark.parametrize("special", [False, True])
def test_what_begins_a_text_stands_in_front_once(special: bool) -> None:
    declared = DeclaredText(beginning_of_text=BEGIN, add_beginning_of_text=True)
    tokenizer = Tokenizer(byte_level(), None, declared)
    for prompt, count in (("", 1), ("xy", 3), ("<s>xy", 3 if special else 6)):
        assert _said(_ids("a</s>"), prompt, tokenizer, special=special).prompt_tokens == count


@pytest.mark.parametrize(
    ("stop", "special", "text", "reason", "noted"),
    [
        (("<|im_end|>",), False, "ab", "stop", False),
        (("<|im_end|>",), True, "ab", "stop", False),
        (("b<|im_end|>\n",), False, "ab\nc", "end_of_text", True),
        (("b<|im_end|>\n",), True, "a", "stop", False),
        (("<|im_end|>c",), True, "ab\nc", "end_of_text", False),
        (("\nc",), True, "ab", "stop", False),
        (("x", "</s"), False, "ab\nc", "end_of_text", False),
    ],
)
def test_special_tokens_that_stop(stop: tuple[str, ...], special: bool, text: str, reason: str, noted: bool) -> None:
    found = _said(_ids("ab<|im_end|>\nc</s>"), stop=stop, special=special)
    assert (found.text, found.reason, bool(found.notes)) == (text, reason, noted)


def test_a_template_is_given_nothing_in_front() -> None:
    for template, count in (("{{ messages[0].content }}", 2), ("<s>{{ messages[0].content }}", 3)):
        declared = DeclaredText(beginning_of_text=BEGIN, add_beginning_of_text=True, chat_template=template)
        tokenizer = Tokenizer(byte_level(), None, declared)
        assert _said(_ids("a</s>"), "hi", tokenizer, chat=True).prompt_tokens == count


def test_letters_that_spell_a_special_token_stop_too() -> None:
    assert _said(LETTERS.encode("a<|im_end|>b").tolist(), stop=("<|im_end|>",), max_tokens=20).text == "a"


def test_every_end_ends() -> None:
    tokenizer = Tokenizer(byte_level(), None, DeclaredText(end_of_text=(STOP, 3)))
    for script in ([5, STOP, 6], [5, 3, 6]):
        found = _said(script, "p", tokenizer)
        assert (found.tokens, found.reason) == (tuple(script[:2]), "end_of_text")


def test_tokens_that_only_the_model_has_are_passed_over() -> None:
    script = Scripted([*_ids("a"), 299, *_ids("b")], vocab_size=300)
    assert continue_text(script, LETTERS, "p", max_tokens=3).text == "ab"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "conversation was given, and a prompt; give one"),
        ({"chat": True, "load_state": "none"}, "conversation was given, and a loaded state: a template writes"),
        ({"chat": True}, "declares no chat template"),
    ],
)
def test_conversations_that_cannot_be(options: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        _said([5], **options)


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mamba of transformers, imported too, that says `a b </s> c <|im_end|> d` after a space, `<s>` or a line."""
    from mambas import follow
    from transformers import MambaConfig, MambaForCausalLM

    folder = tmp_path_factory.mktemp("chained")
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=264, hidden_size=128, num_hidden_layers=1, state_size=4, tie_word_embeddings=False)
    model = MambaForCausalLM(config)
    said = _ids("ab</s>c<|im_end|>d")
    follow(model, {**dict(zip(said, [*said[1:], said[0]], strict=True)), **dict.fromkeys(_ids(" <s>\n"), said[0])})
    model.save_pretrained(folder / "original")
    save(byte_level(), folder / "original")
    import_mamba(folder / "original", folder / "imported")
    return folder


CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Letters, please."}]


@pytest.mark.parametrize(
    ("ends", "begins", "prompt", "text"),
    [
        ([STOP, END], False, "Letters: ", "ab"),
        ([STOP], False, "Letters: ", "abc"),
        ([STOP], True, "", "abc"),
        ([STOP], True, "Letters: ", "abc"),
        ([STOP, END], True, MESSAGES, "ab"),
    ],
    ids=["two ends", "an end of generation_config alone", "no prompt", "a beginning", "a template"],
)
def test_the_text_is_that_of_transformers(
    chained: Path, ends: list[int], begins: bool, prompt: str | list[dict[str, str]], text: str
) -> None:
    from transformers import GenerationConfig, MambaForCausalLM, PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(chained / "original" / "tokenizer.json"), bos_token="<s>", chat_template=CHAT
    )
    if isinstance(prompt, str):
        ids = theirs(prompt, add_special_tokens=begins)["input_ids"]
    else:
        ids = theirs.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    model = MambaForCausalLM.from_pretrained(chained / "original")
    config = GenerationConfig(eos_token_id=ends, pad_token_id=0, max_new_tokens=20, do_sample=False)
    generated = model.generate(torch.tensor([ids]), generation_config=config)[0, len(ids) :]
    assert theirs.decode(generated, skip_special_tokens=True) == text
    declared = DeclaredText(
        end_of_text=tuple(ends), beginning_of_text=BEGIN, add_beginning_of_text=begins, chat_template=CHAT
    )
    (chained / "imported" / "text.json").write_text(declared.to_json())
    chat = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
    found = generate(chained / "imported", max_tokens=20, **chat)  # type: ignore[arg-type]
    assert (found.text, list(found.tokens), found.prompt_tokens) == (text, generated.tolist(), len(ids))
    assert found.reason == "end_of_text"
    if not isinstance(prompt, str):
        one = generate(chained / "imported", "say </s>", chat=True, max_tokens=20)
        assert one.text == text
        assert one.notes == ("a message of user spells </s>, taken for tokens, as in the template",)


def test_a_seed_gives_the_same_text(byte_model: Path) -> None:
    runner, tokenizer = open_runner(byte_model), Tokenizer.byte_level()
    texts = [
        continue_text(runner, tokenizer, "The ", max_tokens=40, temperature=1.0, seed=seed).tokens for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    generator = np.random.default_rng(0)
    drawn = np.bincount([sample(logits, generator, temperature=1.0, top_p=1.0) for _ in range(4000)], minlength=4)
    # Three standard deviations of a share of 0.5 in 4,000 draws.
    np.testing.assert_allclose(drawn / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.024)


def test_temperature_sharpens() -> None:
    logits = np.log(np.array([0.2, 0.8], np.float32))
    generator = np.random.default_rng(0)
    drawn = [sample(logits, generator, temperature=0.5, top_p=1.0) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(0.64 / (0.64 + 0.04), abs=0.012)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.6, 2), (0.9, 3), (1.0, 4)])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: int) -> None:
    logits = np.array([0.5, 0.25, 0.1875, 0.0625])
    generator = np.random.default_rng(0)
    drawn = {sample(np.log(logits), generator, temperature=1.0, top_p=top_p) for _ in range(1000)}
    assert drawn == set(range(kept))


class Broken(Scripted):
    """A Runner whose third logits are no numbers."""

    def __call__(
        self, tokens: NDArray[np.int64], state: State, *, logits: str = "last"
    ) -> tuple[NDArray[np.float32], State]:
        found, state = super().__call__(tokens, state, logits=logits)
        found[..., 7] = np.nan if state.peek() == 2 else 0
        return found, state


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="computed logits that are not finite at token 7 of a stream"):
        continue_text(Broken(b"text"), Tokenizer.byte_level(), "prompt", max_tokens=9)  # type: ignore[arg-type]


def test_bad_options_are_all_named() -> None:
    with pytest.raises(InputError) as caught:
        _run(b"a", max_tokens=0, temperature=-1.0, top_p=0.0, seed=-1, stop=("",))
    for part in ("--max-tokens is 0", "--temperature is -1.0", "--top-p is 0.0", "--seed is -1", "--stop is empty"):
        assert part in str(caught.value)
