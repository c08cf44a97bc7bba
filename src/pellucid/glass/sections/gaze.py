"""Where one word of a text looks, in every layer and head."""

from __future__ import annotations

from pellucid.glass.markup import Html, folded, listed, paragraph, percent, plural, section, tag
from pellucid.glass.reading import Bundle, Fields, Model, words
from pellucid.glass.sections.passage import Word, level_of, passage, quoted, scale

MAX_LINES = 240
"""Lines of text in one report, one for each head."""

NAMED = 3
"""Words that are named beside each line, those with the largest weights."""

MEANS = {
    "next": "Each line shows how strongly the framed word, the last that was read before the next was told, "
    "attends to those before it and to itself.",
    "masked": "Each line shows how strongly the framed word, one that had to be told, attends to all words.",
    "whole": "Each line shows how strongly the average word attends to each.",
}
"""What the lines are, by what the model has to do."""

MEMBERSHIP = (
    "This model compares no words with each other: each line shows what share of each word belongs to the "
    "group of that head."
)


def gaze(bundle: Bundle) -> Html:
    """The subject's texts, then those of the others folded away."""
    left = [MAX_LINES]
    shown = [(model, block) for model in bundle.models if (block := _block(model, left))]
    if not shown:
        return Html("")
    subject = shown[0][0]
    what = MEANS.get(subject.text.text("task"), MEANS["next"])
    if any(each.text("kind") == "membership" for each in subject.text.many("attention")):
        what = MEMBERSHIP
    lead = (
        "Look down a layer: heads that mean something pick different words, and the same kind in both texts."
    )
    key = tag("p", scale("a", "none", "the line’s largest weight"), class_="legend")
    body = [
        block if model.index == 0 else folded(f"The same for {model.label}", block) for model, block in shown
    ]
    return section("attention", "Where a word looks", lead, paragraph(what), key, *body)


def _block(model: Model, left: list[int]) -> Html:
    drawn = [_text(each, left) for each in model.text.many("attention")]
    return tag("div", *drawn) if any(drawn) else Html("")


def _text(fields: Fields, left: list[int]) -> Html:
    texts = [words(word) for word in fields.values("words")]
    reader = fields.integer("reader")
    layers = []
    cut = 0
    numbered = list(enumerate(fields.many("layers"), start=1))
    for i, layer in numbered:
        heads = [_weights(head, len(texts)) for head in layer.values("heads")]
        heads = [head for head in heads if head]
        if not heads or len(heads) > left[0]:
            cut += bool(heads)
            continue
        left[0] -= len(heads)
        lines = [_line(k, head, texts, reader) for k, head in enumerate(heads, start=1)]
        number = layer.integer("layer")
        name = f"Layer {i if number is None else number}"
        layers.append(tag("details", tag("summary", name), *lines, class_="lines", open=i == numbered[-1][0]))
    if not layers:
        return Html("")
    said = [fields.text("name")]
    if reader is not None and 0 <= reader < len(texts):
        said.append(f"from {quoted(texts[reader])}")
    if fields.text("told"):
        said.append(f"to tell {quoted(fields.text('told'))}")
    heading = tag("p", *(tag("span", part) for part in said if part), class_="kicker")
    note = paragraph(f"{plural(cut, 'layer')} left out to keep this file small.") if cut else ""
    return tag("div", heading, *layers, note, class_="text")


def _weights(head: object, size: int) -> list[float]:
    """The weights with holes as zero; empty if there is not one for each word."""
    values = Fields({"head": head}).numbers("head")
    return [max(value or 0.0, 0.0) for value in values] if len(values) == size else []


def _line(number: int, weights: list[float], texts: list[str], reader: int | None) -> Html:
    """One head: the text by its weights, and its largest ones in words."""
    top, total = max(weights), sum(weights)
    shown = [
        Word(text, level_of(weight, top), class_="reader" if i == reader else "")
        for i, (text, weight) in enumerate(zip(texts, weights, strict=True))
    ]
    most = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[:NAMED]
    named = [f"{_placed(texts, i)} {percent(weights[i] / total)}" for i in most if weights[i] > 0]
    said = tag(
        "p", tag("b", f"head {number}"), f" most on {listed(named)}" if named else " empty", class_="note"
    )
    return tag("div", said, passage(shown, "a"), class_="line")


def _placed(texts: list[str], i: int) -> str:
    """A word in quotation marks, a single character with those in front of it that make a word."""
    first = i
    while len(texts[i]) == 1 and first > 0 and i - first < 6 and len(texts[first - 1].strip()) == 1:
        first -= 1
    return quoted("".join(texts[first : i + 1]))
