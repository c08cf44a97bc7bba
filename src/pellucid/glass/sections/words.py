"""Held-out texts word by word: what surprised the model, and what it writes itself."""

from __future__ import annotations

import math

from pellucid.glass import charts
from pellucid.glass.markup import (
    Cell,
    Html,
    folded,
    number,
    numeric,
    paragraph,
    percent,
    plural,
    section,
    table,
    tag,
)
from pellucid.glass.reading import Bundle, Fields, Model, finite, sequence, words
from pellucid.glass.sections.data import setting
from pellucid.glass.sections.passage import Word, level_of, one_line, passage, quoted, scale

SURPRISES = 6
"""Words of a text that are listed beside it, the most surprising ones."""

BESIDE = 2
"""Texts that are shown of the models that stand beside the subject."""

BEFORE = 24
"""Characters in front of a word in a list."""


def surprises(bundle: Bundle) -> Html:
    """The subject's texts, then those of the others folded away."""
    subject, *others = bundle.models or [bundle.subject]
    shown = _texts(subject, bundle, None)
    more = [
        folded(f"The same for {other.label}", *drawn)
        for other in others
        if (drawn := _texts(other, bundle, BESIDE))
    ]
    if not shown and not more:
        return Html("")
    task = subject.text.text("task")
    lead = {
        "masked": "Look at the coloured words: they were hidden, and told from all others.",
        "whole": "Look at what the model had to tell a class from.",
    }.get(
        task,
        "Look where the colour is strong: there the text went on in a way that the model did not expect.",
    )
    return section("words", "What surprises it" if task != "whole" else "What it read", lead, *shown, *more)


def _texts(model: Model, bundle: Bundle, most: int | None) -> list[Html]:
    unit = model.text.text("unit", "word")
    blind = _blind(bundle)
    shown = [_text(sample, unit, blind) for sample in model.text.many("samples")[:most]]
    shown = [each for each in shown if each]
    told = any(
        word.number("bits") is not None for s in model.text.many("samples") for word in s.many("words")
    )
    if not shown or not told:
        return shown
    key = tag(
        "p",
        scale(
            "q", "no surprise", f"{number(blind)} bits or more, as many as a guess among all {unit}s takes. "
        ),
        tag("span", "Point at one to see what was likelier."),
        class_="legend",
    )
    return [key, *shown]


def _blind(bundle: Bundle) -> float:
    """Bits that it takes to tell one of all words when nothing is known."""
    known = bundle.fields.one("data").one("tokenizer").number("vocab_size")
    return math.log2(known) if known is not None and known > 2 else 8.0


def _text(sample: Fields, unit: str, blind: float) -> Html:
    given = sample.many("words")
    if not given:
        return Html("")
    shown = [_word(word, blind) for word in given]
    bits = [b for word in given if (b := word.number("bits")) is not None]
    said = [sample.text("name")]
    label, predicted = sample.text("label"), sample.text("predicted")
    if predicted:
        right = predicted == label
        said.append(
            "recognised" if right else f"taken for {predicted}" if label else f"predicted {predicted}"
        )
    if label:
        said.append(label)
    if bits:
        told = plural(len(bits), "character" if unit == "byte" else unit)
        said.append(f"{told} told at {number(sum(bits) / len(bits))} bits each, in the mean")
    heading = tag("p", *(tag("span", part) for part in said if part), class_="kicker")
    return tag("div", heading, passage(shown, "q"), _listed(given, unit), class_="text")


def _word(word: Fields, blind: float) -> Word:
    bits = word.number("bits")
    class_ = "special" if word.flag("special") else ""
    if bits is None:
        return Word(word.text("text"), class_=class_)
    return Word(word.text("text"), level_of(bits, blind), f"{number(bits)} bits{_likelier(word)}", class_)


def _likelier(word: Fields) -> str:
    told = _likeliest(word)
    return f"; likeliest: {told}" if told else ""


def _likeliest(word: Fields) -> str:
    """``‘e’ 41 %, ‘a’ 12 %``."""
    parts = []
    for pair in word.values("likeliest"):
        text, chance = (*sequence(pair), None, None)[:2]
        share = finite(chance)
        if text is not None and share is not None:
            parts.append(f"{quoted(charts.clip(words(text), 24))} {percent(share)}")
    return ", ".join(parts)


def _listed(given: list[Fields], unit: str) -> Html:
    """The most surprising words in a table, with what was likelier: the colours in words."""
    known = [(b, k) for k, word in enumerate(given) if (b := word.number("bits")) is not None]
    worst = sorted(known, key=lambda pair: (-pair[0], pair[1]))[:SURPRISES]
    if not worst:
        return Html("")
    rows: list[list[Cell | str]] = []
    for bits, k in worst:
        before = "".join(word.text("text") for word in given[max(0, k - BEFORE) : k])[-BEFORE:]
        where = one_line(before)
        shown = [tag("span", each, class_="path") for each in (quoted(given[k].text("text")), where)]
        rows.append([shown[0], numeric(bits), shown[1], tag("span", _likeliest(given[k]), class_="path")])
    what = "character" if unit == "byte" else unit
    return folded(
        f"The most surprising {what}s of this text",
        table("The most surprising first", [what, "bits", "after", "likeliest in its place"], rows),
    )


def written(bundle: Bundle) -> Html:
    """Samples of what each model writes, the prompt set apart."""
    shown = []
    for model in bundle.models:
        block = _written(model)
        if block:
            first = model.index == 0
            shown.append(block if first else folded(f"The same for {model.label}", block))
    if not shown:
        return Html("")
    lead = "Look how far it stays a text: whether words, lines and sentences hold, and for how long."
    return section("writing", "What it writes", lead, *shown)


def _written(model: Model) -> Html:
    fields = model.text.one("written")
    texts = [each for each in fields.many("texts") if each.text("text") or each.text("prompt")]
    if not texts:
        return Html("")
    options = ", ".join(
        f"{name.replace('_', ' ')} {setting(value)}" for name, value in fields.one("settings").items()
    )
    drawn = [
        tag(
            "div",
            tag("p", tag("span", _begun(each)), class_="kicker"),
            passage([Word(each.text("prompt"), class_="given"), Word(each.text("text"))], "q"),
            class_="text",
        )
        for each in texts
    ]
    return tag("div", *drawn, paragraph(f"Drawn with {options}." if options else "", class_="note"))


def _begun(each: Fields) -> str:
    """From what it was written, and whether the model ended it."""
    begun = "behind the beginning of a held-out text, in grey" if each.text("prompt") else "from nothing"
    return f"{begun}; the model ended it itself" if each.flag("ended") else begun
