"""What a tokenizer is, and the simplest: each byte is a word."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, final

import numpy as np
import numpy.typing as npt

from pellucid.errors import ConfigError

END, MASK = "<|endoftext|>", "<|mask|>"

Ids = npt.NDArray[np.int32]


class Tokenizer(ABC):
    """Text to words and back. Words are numbers below ``vocab_size``.

    ``name``: "bytes", "bpe", "gpt2", or the file that it was read from. ``end``: the word that begins and
    ends a text. ``mask``: the word that stands for a hidden one. ``special``: all words that no text has.
    """

    name: str
    vocab_size: int
    end: int
    mask: int
    special: frozenset[int]

    @abstractmethod
    def encode(self, data: bytes) -> Ids:
        """The words of a text, int32 (n,), none of them special, whatever is written there."""

    def encode_each(self, texts: Iterable[bytes]) -> Iterator[npt.NDArray[np.integer]]:
        """The words of each text, in order."""
        return map(self.encode, texts)

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> bytes:
        """The text of these words; special ones are left out. Raises ConfigError for what is no word."""

    @abstractmethod
    def piece(self, word: int) -> str:
        """One word as it can be shown: what is not printable is escaped."""

    @abstractmethod
    def to_json(self) -> str:
        """A ``tokenizer.json`` that the library ``tokenizers`` reads, and ``transformers`` with it.

        Both find the same words in a text, unless a special one is spelt out there: theirs is then special.
        """

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what decides which words a text has."""
        decides = {key: part for key, part in json.loads(self.to_json()).items() if key in _DECIDES}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def _refuse(self, words: Iterable[int]) -> None:
        """Raises ConfigError for the first that is none."""
        for word in words:
            if not 0 <= word < self.vocab_size:
                raise ConfigError(
                    f"word {word}, and the tokenizer {self.name} has {self.vocab_size:,}"
                    " - use the tokenizer that the model was trained with"
                )


_DECIDES = ("added_tokens", "normalizer", "pre_tokenizer", "model")


@final
class ByteTokenizer(Tokenizer):
    """Each byte is a word, 0 to 255; 256 begins and ends a text, and stands for what is hidden."""

    name = "bytes"
    vocab_size = 257
    end = mask = 256
    special = frozenset({256})

    def encode(self, data: bytes) -> Ids:
        return np.frombuffer(data, dtype=np.uint8).astype(np.int32)

    def encode_each(self, texts: Iterable[bytes]) -> Iterator[npt.NDArray[np.integer]]:
        return (np.frombuffer(text, dtype=np.uint8) for text in texts)

    def decode(self, ids: Iterable[int]) -> bytes:
        words = [int(word) for word in ids]
        self._refuse(words)
        return bytes(word for word in words if word != self.end)

    def piece(self, word: int) -> str:
        self._refuse([word])
        return END if word == self.end else shown(bytes([word]))

    def to_json(self) -> str:
        """Byte-level BPE without a merge: its words are the bytes."""
        return json.dumps(_BYTES, ensure_ascii=False, indent=1)


def shown(text: bytes) -> str:
    """Any bytes in printable characters: a line's end is ``\\n``, half a character ``\\xc3``."""
    characters = text.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in characters)


def _letters() -> dict[str, int]:
    """The letter that stands for each byte in a ``tokenizer.json``, as GPT-2 has it.

    What Latin-1 prints stands for itself; the other bytes get the letters from U+0100 on, in order.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {byte: chr(byte) for byte in printed} | {byte: chr(256 + k) for k, byte in enumerate(others)}
    return {letters[byte]: byte for byte in range(256)}


LETTERS = _letters()

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": 256, "content": END, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
    ],
    "normalizer": None,
    "pre_tokenizer": _BYTE_LEVEL,
    "post_processor": None,
    "decoder": _BYTE_LEVEL,
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": LETTERS | {END: 256},
        "merges": [],
    },
}


def is_bytes(found: dict[str, Any]) -> bool:
    """Whether this ``tokenizer.json`` says what that of bytes does, whichever program has written it."""
    model, before = found["model"], found.get("pre_tokenizer") or {}
    added = [(token["id"], token["content"], token["special"]) for token in found.get("added_tokens") or []]
    return (
        model.get("type", "BPE") == "BPE"
        and not model.get("merges")
        and {letter: word for letter, word in model["vocab"].items() if letter != END} == LETTERS
        and added == [(256, END, True)]
        and before.get("type") == "ByteLevel"
        and not before.get("add_prefix_space")
        and not found.get("normalizer")
    )
