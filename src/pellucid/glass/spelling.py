"""Words of a tokenizer as text to be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pellucid.data import Tokenizer

CHARACTER = 4
"""Bytes of a character at most, in UTF-8."""


@dataclass(frozen=True)
class Piece:
    """What can be shown of a text: a whole character at least, of the words ``first`` to ``last``."""

    text: str
    first: int
    last: int
    special: bool


def pieces(tokenizer: Tokenizer, words: Sequence[int]) -> list[Piece]:
    """The words as text. Parts of one character are one piece; what is no UTF-8 is told in hex."""
    found, at = [], 0
    while at < len(words):
        text, last = _character(tokenizer, words, at)
        special = words[at] in tokenizer.special
        found.append(Piece(text or tokenizer.piece(words[at]), at, last, special))
        at = last + 1
    return found


def spelt(tokenizer: Tokenizer, words: Sequence[int]) -> str:
    """The words as text."""
    return "".join(piece.text for piece in pieces(tokenizer, words))


def one_by_one(tokenizer: Tokenizer, words: Sequence[int]) -> list[str]:
    """Each word as text by itself; a part of a character, and what no text has, as it can be shown."""
    found = []
    for word in words:
        text = ""
        if word not in tokenizer.special:
            try:
                text = tokenizer.decode([word]).decode()
            except UnicodeDecodeError:
                text = ""
        found.append(text or tokenizer.piece(word))
    return found


def _character(tokenizer: Tokenizer, words: Sequence[int], at: int) -> tuple[str, int]:
    """The text from ``at`` on that ends where a character ends; empty if there is none."""
    raw = b""
    for last in range(at, min(at + CHARACTER, len(words))):
        if words[last] in tokenizer.special:
            break
        raw += tokenizer.decode([words[last]])
        try:
            return raw.decode(), last
        except UnicodeDecodeError:
            continue
    return "", at
