"""Words of a text, by numbers: bytes as they are."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

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
        """The words of a text, int32 (n,), none of them special."""

    def encode_each(self, texts: Iterable[bytes]) -> Iterator[npt.NDArray[np.integer]]:
        """The words of each text, in order; faster than one by one."""
        return map(self.encode, texts)

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> bytes:
        """The text of these words; special ones are left out."""

    @abstractmethod
    def piece(self, word: int) -> str:
        """One word as it can be shown."""

    @abstractmethod
    def to_json(self) -> str:
        """A ``tokenizer.json`` that the library ``tokenizers`` reads, with the same words of any text."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides which words a text has."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


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
        return bytes(word for word in map(int, ids) if word != self.end)

    def piece(self, word: int) -> str:
        if word == self.end:
            return END
        character = chr(word)
        return character if word < 128 and character.isprintable() else f"<{word:02x}>"

    def to_json(self) -> str:
        raise NotImplementedError


def find_tokenizer(name: str, vocab_size: int, texts: Callable[[], Iterable[bytes]]) -> Tokenizer:
    """"""
    if name == "bytes":
        return ByteTokenizer()
    raise ConfigError(f"no tokenizer is called '{name}'")
