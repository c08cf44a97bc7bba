"""Text on the page: words on a ground that is the stronger the more there is to say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from pellucid.glass.markup import Html, tag

LEVELS = 8
"""Strengths of the ground, besides none."""

MAX_TITLE = 200
"""Characters of what is said of a word when it is pointed at."""


@dataclass(frozen=True)
class Word:
    """A stretch of text, how strong its ground is (0 to ``LEVELS``), and what pointing at it says."""

    text: str
    level: int = 0
    said: str = ""
    class_: str = ""


def passage(words: Sequence[Word], kind: str, class_: str = "") -> Html:
    """The words as one text. ``kind`` is the colour: ``q`` of what surprises, ``a`` of what is looked at.

    Neighbours of which the same is to be said are one stretch.
    """
    shown = []
    for (level, said, own), group in groupby(words, key=lambda word: (word.level, word.said, word.class_)):
        text = "".join(visible(word.text) for word in group)
        classes = " ".join(part for part in (f"{kind}{level}" if level > 0 else "", own) if part)
        plain = not classes and not said
        shown.append(
            text if plain else tag("span", text, class_=classes or None, title=said[:MAX_TITLE] or None)
        )
    return tag("p", *shown, class_=f"passage {class_}".strip())


def visible(text: str) -> str:
    """Line ends with a sign of their own, so that they can be coloured and pointed at."""
    return _signed(text, "↵\n")


def one_line(text: str) -> str:
    """The signs of line ends alone."""
    return _signed(text, "↵")


def _signed(text: str, end: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", end).replace("\t", "⇥\t")


def quoted(text: str) -> str:
    """One word in a sentence: in quotation marks, so that its spaces are seen."""
    return f"‘{one_line(text)}’"


def level_of(value: float, most: float) -> int:
    """The strength for ``value``, of which ``most`` has the strongest."""
    if most <= 0 or value <= 0:
        return 0
    return min(LEVELS, round(LEVELS * value / most))


def scale(kind: str, least: str, most: str) -> Html:
    """The strengths in a row, and what the ends mean."""
    steps = [tag("span", "\u2007", class_=f"{kind}{level}" if level else None) for level in range(LEVELS + 1)]
    return tag("span", least, " ", tag("span", *steps, class_="steps", aria_hidden="true"), " ", most)
