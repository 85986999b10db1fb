# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers of every kind that public models use, with special tokens; nothing is trained or downloaded."""

from collections.abc import Callable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
_BYTE_TOKENS = [f"<0x{value:02X}>" for value in range(256)]
_WORDS = ("▁Hello", "▁world", "▁the", "▁größer", "漢字")


def _merged(words: tuple[str, ...], vocabulary: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """`vocabulary`, every beginning of the words, and the merges that lead there."""
    entries, merges = dict.fromkeys(vocabulary), {}
    for word in words:
        for end in range(1, len(word)):
            entries |= {word[end]: None, word[:end]: None, word[: end + 1]: None}
            merges[word[:end], word[end]] = None
    return {entry: i for i, entry in enumerate(entries)}, list(merges)


def byte_level() -> tokenizers.Tokenizer:
    """256 bytes and no merges, then the special tokens: 256, 257, …; a text begins with `<s>`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return made


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama's: a space put in front and one taken away again, bytes for what it does not know."""
    vocabulary, merges = _merged(_WORDS, [*SPECIAL, *_BYTE_TOKENS, "▁", "x", "."])
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(list(SPECIAL))
    return made


def unigram() -> tokenizers.Tokenizer:
    """As T5's and many of SentencePiece: Metaspace before and after."""
    pieces = [*SPECIAL, "▁", *_WORDS, "▁is", "ing", *"Helowrdthgöß漢字x.", "▁▁"]
    made = tokenizers.Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], 0, False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(list(SPECIAL))
    return made


def word_piece() -> tokenizers.Tokenizer:
    """As BERT's."""
    pieces = [*SPECIAL, "hello", "world", "the", "##ing", "##s", "don", "'", "t", "n't", "do", ".", ",", "漢", "字"]
    made = tokenizers.Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(list(SPECIAL))
    return made


def suffixed() -> tokenizers.Tokenizer:
    """As GPT's first: a word's last token ends in `</w>`."""
    words = ("hello</w>", "world</w>", "the</w>", ".</w>")
    entries, merges = [*SPECIAL, *"helowrdt."], []
    for word in words:
        letters = [*word[: -len("</w>") - 1], word[-len("</w>") - 1 :]]
        entries += letters
        for end in range(1, len(letters)):
            merges.append(("".join(letters[:end]), letters[end]))
            entries.append("".join(letters[: end + 1]))
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    made.add_special_tokens(list(SPECIAL))
    return made


MADE: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte-level": byte_level,
    "byte fallback": byte_fallback,
    "unigram": unigram,
    "word piece": word_piece,
    "suffix": suffixed,
}


def save(made: tokenizers.Tokenizer, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder
