# SPDX-License-Identifier: Apache-2.0
"""What the files beside a source's weights declare about its text, as one `text.json` (`mossquant.text.declared`).

Where two of them say it, the one that `transformers` 5 goes by wins: generation_config.json before config.json, and
both before the tokenizer's names; chat_template.jinja before tokenizer_config.json; special_tokens_map.json before
tokenizer_config.json, unless that lists its added tokens; the post-processor of tokenizer.json before `add_bos_token`,
which counts where that puts nothing in front. What is not taken along is said in notes, by name.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field

from mossquant.errors import InputError
from mossquant.files.inputs import check_fetched, read_bytes
from mossquant.files.json import LARGEST, LARGEST_SMALL, Stored, read_json, validated
from mossquant.importing.mamba_configs import whole_numbers
from mossquant.text.declared import DeclaredText
from mossquant.text.tokenizer import Tokenizer

_SPACED = ("a b", " a", "a  b ", "\ta\nb", "ﬁ ½ é 漢")
_ADVICE = "Mend or copy it again, or take it away."
_TEMPLATE = "chat_template.jinja"
# Of generation_config.json: what is read here, or says nothing about a text; and what `generate` has an option for.
_READ = {"eos_token_id", "bos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "use_cache"}
_OPTIONS = {"temperature": "--temperature", "top_p": "--top-p", "stop_strings": "--stop"}
_OPTIONS |= dict.fromkeys(("max_length", "max_new_tokens"), "--max-tokens")

Ids = Annotated[
    list[Annotated[int, Field(strict=True)]],
    FailFast(),
    BeforeValidator(lambda ids: ids if isinstance(ids, list) else [] if ids is None else [ids]),
]
"""One token id, several, or null."""
Spelling = Annotated[str, BeforeValidator(lambda token: token.get("content") if isinstance(token, dict) else token)]
"""A token, written plainly or as an object."""


class _Ids(BaseModel):
    """The part of generation_config.json and of config.json that is about text."""

    eos_token_id: Ids = []
    bos_token_id: Annotated[Ids, Field(max_length=1)] = []


class _Added(BaseModel):
    content: str
    special: bool = False


class _Template(BaseModel):
    name: str
    template: str


class _Names(BaseModel):
    """What tokenizer_config.json and special_tokens_map.json say together; keys that end in `_token` are extra ones."""

    model_config = ConfigDict(extra="allow")

    added_tokens_decoder: dict[int, _Added] = {}
    extra_special_tokens: list[Spelling] | dict[str, Spelling] | None = None
    additional_special_tokens: Annotated[list[Spelling], FailFast(), BeforeValidator(lambda tokens: tokens or [])] = []
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    chat_template: str | list[_Template] | None = None

    def named(self) -> dict[str, str]:
        """What templates call a token → its spelling."""
        extra = self.extra_special_tokens if isinstance(self.extra_special_tokens, dict) else {}
        tokens = {name: token for name, token in (self.model_extra or {}).items() if name.endswith("_token")}
        spelled = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
        return {name: token for name, token in spelled.items() if isinstance(token, str) and token} | extra

    def special(self) -> list[str]:
        """The spellings of all special tokens that are named or listed."""
        listed = [*self.additional_special_tokens]
        listed += self.extra_special_tokens if isinstance(self.extra_special_tokens, list) else []
        added = [token.content for token in self.added_tokens_decoder.values() if token.special]
        return list(dict.fromkeys([*self.named().values(), *listed, *added]))


def declared_text(folder: Path, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[DeclaredText, list[str]]:
    """What the files of `folder` declare about the text of its model, and notes, a sentence each.

    Args:
        folder: of Hugging Face's layout; a file that it lacks declares nothing.
        tokenizer: the model's, as its file alone says; None where it has none.
        vocab_size: entries of the model.

    Raises:
        InputError: a file that is not what it should be, or token ids that the model or the tokenizer has not.
    """
    generation, config, named, mapped = (
        _object(folder / f"{name}.json")
        for name in ("generation_config", "config", "tokenizer_config", "special_tokens_map")
    )
    named = mapped | named if "added_tokens_decoder" in named else named | mapped
    names = _validated(named, _Names, folder, "tokenizer_config")
    notes = _not_taken(generation, names, tokenizer)
    spelled = names.named()
    odd = [name for name in named if name.endswith("_token") and not name.startswith("add_")]
    odd = [name for name in odd if named[name] and name not in spelled]
    notes += [f"{name} is not the spelling of a token, and is left out" for name in odd]
    special = _special_ids(names, tokenizer, folder, notes)
    said = [_validated(generation, _Ids, folder, "generation_config"), _validated(config, _Ids, folder, "config")]
    ends = said[0].eos_token_id or said[1].eos_token_id
    begins = said[0].bos_token_id or said[1].bos_token_id
    wrong = sorted({i for i in (*ends, *begins, *special.values()) if not 0 <= i < vocab_size})
    if wrong:
        what = f"{folder} declares tokens that a vocabulary of {vocab_size} has not"
        raise InputError.listing(what, [str(i)[:40] for i in wrong], "Mend its config.json or generation_config.json.")
    end, begin = (special.get(spelled.get(name, "")) for name in ("eos_token", "bos_token"))
    if not ends:
        ends = [end] if end is not None else []
    elif end is not None and end not in ends:
        notes.append(f"the configs end a text at token {ends}, and not at the tokenizer's eos_token, which is {end}")
    if tokenizer is not None:
        ordinary = [f"{i} ({tokenizer.spelling(i)!r})" for i in ends if i not in tokenizer.special_tokens.values()]
        notes += [
            f"token {token}, which is said to end a text, is no special one of tokenizer.json" for token in ordinary
        ]
    front = [] if tokenizer is None else tokenizer.added[0]
    put = len(front) == 1 or (not front and names.add_bos_token is True and begin is not None)
    begin = next((i for i in (*front[:1], begin if put else None, *begins, begin) if i is not None), None)
    template, others = _template(folder, names)
    notes += [f"chat templates other than the default one are not taken along: {', '.join(others)}"] if others else []
    values = {
        "end_of_text": tuple(dict.fromkeys(ends)),
        "beginning_of_text": begin,
        "add_beginning_of_text": put,
        "special_tokens": special,
        "token_names": {name: token for name, token in spelled.items() if token in special},
        "chat_template": template,
    }
    return _validated(values, DeclaredText, folder, "text"), notes


def converted_tokenizer(folder: Path, scratch: Path, notes: list[str]) -> Path | None:
    """The `tokenizer.json` that `transformers` makes, in `scratch`, where a folder has SentencePiece's file only.

    It does where it is installed, with sentencepiece, and tokenizer_config.json names the class, which decides about
    spaces. None where it does not, or there is nothing to convert; notes say what was done, or how it is done.
    """
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        return None
    check_fetched(folder / "tokenizer.model")
    try:
        kind = _object(folder / "tokenizer_config.json")["tokenizer_class"]
        from sentencepiece import SentencePieceProcessor
        from transformers import AutoTokenizer

        library = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ).backend_tokenizer
        library.save(str(scratch / "tokenizer.json"))
        original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        differ = any(library.encode(text, add_special_tokens=False).ids != original.encode(text) for text in _SPACED)
    except InputError:
        raise
    except Exception as error:  # whatever the libraries, which may not be there, say of a stranger's file
        notes.append(
            f"tokenizer.model (SentencePiece) is not converted ({type(error).__name__}: {str(error)[:80]}); with "
            "transformers and sentencepiece installed, load the tokenizer by its class (LlamaTokenizer, …) and "
            "save_pretrained it, then give its tokenizer.json with --tokenizer"
        )
        return None
    otherwise = ", which splits spaces otherwise than SentencePiece" if differ else ""
    notes.append(f"tokenizer.model was converted by transformers as {str(kind)[:40]}{otherwise}")
    return scratch / "tokenizer.json"


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file."""
    values = read_json(path, largest=LARGEST, advice="mend or copy it again, or take it away") if path.is_file() else {}
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a JSON object. {_ADVICE}")
    read: dict[str, Any] = whole_numbers(values)
    return read


def _validated(values: dict[str, Any], schema: type[Stored], folder: Path, name: str) -> Stored:
    noun = "what a model declares about its text"
    return validated(values, schema, where=f"{folder / name}.json", noun=noun, advice=_ADVICE)


def _special_ids(names: _Names, tokenizer: Tokenizer | None, folder: Path, notes: list[str]) -> dict[str, int]:
    """Spelling → id of every special token: by the tokenizer, or without one as added_tokens_decoder numbers it."""
    added = {token.content: i for i, token in names.added_tokens_decoder.items()}
    special = {} if tokenizer is None else dict(tokenizer.special_tokens)
    offenders, unknown = [], []
    for spelling in dict.fromkeys([*names.special(), *added]):
        token = added.get(spelling) if tokenizer is None else tokenizer.token(spelling)
        if token is None:
            unknown.append(spelling)
        elif added.get(spelling, token) != token:
            offenders.append(f"{spelling[:40]} is {added[spelling]}, not {token}")
        elif spelling in names.special():
            special[spelling] = token
    if offenders:
        what = f"{folder / 'tokenizer_config.json'} numbers tokens otherwise than the tokenizer"
        raise InputError.listing(what, offenders, "Give the tokenizer that the model was trained with.")
    if unknown:
        notes.append(f"tokens that the tokenizer has not are left out: {', '.join(unknown)[:300]}")
    return special


def _template(folder: Path, names: _Names) -> tuple[str | None, list[str]]:
    """The default chat template, and the names of the others."""
    listed = names.chat_template
    templates = {one.name: one.template for one in listed} if isinstance(listed, list) else {"default": listed}
    path = folder / _TEMPLATE
    if path.is_file():
        try:
            text = read_bytes(path, largest=LARGEST_SMALL, advice="take it away").decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 at byte {error.start}; convert it to UTF-8") from None
        templates = {"default": text.replace("\r\n", "\n")}
    others = [name for name in templates if name != "default"]
    others += sorted(file.stem for file in (folder / "additional_chat_templates").glob("*.jinja"))
    return templates.get("default"), others


def _not_taken(generation: dict[str, Any], names: _Names, tokenizer: Tokenizer | None) -> list[str]:
    """What the files ask for and `text.json` does not hold."""
    neutral: tuple[Any, ...] = (None, False, 0, 1, [], {})
    asked = {
        key: value for key, value in generation.items() if key not in _READ and (value is True or value not in neutral)
    }
    notes = []
    if asked:
        shown = ", ".join(f"{key} {value}" for key, value in asked.items())
        options = ", ".join(dict.fromkeys(_OPTIONS[key] for key in asked if key in _OPTIONS))
        given = f" (generate has {options})" if options else ""
        notes.append(f"generation_config.json asks for {shown[:400]}, which is not followed{given}")
    if names.add_eos_token or (tokenizer is not None and tokenizer.added[1]):
        notes.append("the tokenizer puts tokens behind a text (post-processor or add_eos_token), which is not done")
    if tokenizer is not None:
        front = tokenizer.added[0]
        if len(front) > 1:
            notes.append(
                f"the tokenizer's post-processor puts {len(front)} tokens in front of a text, which is not done"
            )
        if names.add_bos_token is not None and bool(front) != names.add_bos_token:
            does = "puts one in front" if front else "does not"
            notes.append(f"add_bos_token is {names.add_bos_token}, the post-processor {does}: a text gets one in front")
        notes += [f"{part} of tokenizer.json is not applied" for part in tokenizer.left_out]
    if names.clean_up_tokenization_spaces:
        notes.append("clean_up_tokenization_spaces is not done: text is decoded as it was encoded")
    return notes
