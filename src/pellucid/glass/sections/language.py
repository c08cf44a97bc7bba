"""The answer of a report on text in one sentence, the models beside each other, and what context is worth."""

from __future__ import annotations

import math

from pellucid.glass import charts
from pellucid.glass.markup import (
    NONE,
    Cell,
    Html,
    count,
    duration,
    figure,
    listed,
    number,
    numeric,
    panels,
    paragraph,
    percent,
    plural,
    section,
    shared,
    table,
    tag,
)
from pellucid.glass.reading import Bundle, Fields, Model
from pellucid.glass.sections.headline import _size, _verdict, between


def text_headline(bundle: Bundle) -> Html:
    """Title line, the answer, what stands behind it, and the comparison."""
    fields = bundle.fields
    version = fields.text("version")
    about = [fields.text("title", "report"), fields.text("created"), f"pellucid {version}" if version else ""]
    return tag(
        "header",
        tag("p", *(tag("span", part) for part in about if part), class_="kicker"),
        tag("h1", answer(bundle.subject)),
        paragraph(
            *_behind(bundle), *(_beside(other, bundle.subject) for other in bundle.models[1:]), class_="lead"
        ),
        _comparison(bundle.models),
    )


def answer(model: Model) -> str:
    """How well it tells what it has not seen, and whether every layer does its step."""
    scores, unit, task = model.text.one("scores"), _unit(model), model.text.text("task")
    work = {None: "", True: ", and every layer does its step", False: ", but not every layer does its step"}
    rest = work[model.descends]
    bits, nats, accuracy = scores.number("bits_per_byte"), scores.number("nats"), scores.number("accuracy")
    if task == "whole":
        right, of = model.scores.number("accuracy"), model.scores.integer("count")
        among = f"of {plural(of, 'test text')}" if of else "of the test texts"
        if right is not None:
            return f"{model.label} recognises {percent(right, 1)} {among}{rest}."
    elif task == "masked" and accuracy is not None:
        return f"{model.label} fills in {percent(accuracy, 1)} of the hidden {unit}s of unseen text{rest}."
    elif bits is not None:
        return f"{model.label} needs {number(bits)} bits for each byte of unseen text{rest}."
    elif nats is not None:
        return f"{model.label} needs {number(nats)} nats for each {unit} of unseen text{rest}."
    return f"{model.label}, looked at layer by layer{rest}."


def _unit(model: Model) -> str:
    return model.text.text("unit", "word")


def _behind(bundle: Bundle) -> list[str]:
    """Interval, perplexity, the same without context, verdict, size and time in sentences."""
    subject = bundle.subject
    scores, unit = subject.text.one("scores"), _unit(subject)
    said = [_interval_said(subject), _perplexity_said(scores, unit), _alone_said(bundle)]
    said.append(subject.audit.one("verdict").text("text"))
    size, seconds = subject.fields.number("parameters"), subject.fields.number("seconds")
    has = f"has {count(size)} parameters" if size is not None else ""
    learned = f"trained in {duration(seconds)}" if seconds is not None else ""
    both = listed([part for part in (has, learned) if part])
    return [*said, f"It {both}." if both else ""]


def _interval_said(model: Model) -> str:
    scores, task = model.text.one("scores"), model.text.text("task")
    share = percent(scores.number("confidence") or 0.95)
    if task == "whole":
        ends = model.interval
        return f"With {share} confidence its accuracy lies between {between(*ends, 'and')}." if ends else ""
    documents = scores.integer("documents")
    over = f", by how much {plural(documents, 'document')} differ" if documents else ""
    if task == "masked":
        ends = scores.ends("accuracy_interval")
        return f"With {share} confidence it is between {between(*ends, 'and')}{over}." if ends else ""
    ends = scores.ends("bits_interval") or scores.ends("interval")
    if not ends:
        return ""
    return f"With {share} confidence it is between {number(ends[0])} and {number(ends[1])}{over}."


def _perplexity_said(scores: Fields, unit: str) -> str:
    nats, perplexity = scores.number("nats"), scores.number("perplexity")
    if nats is None or perplexity is None:
        return ""
    told = f"That is {number(nats)} nats for each {unit}, a perplexity of {number(perplexity)}"
    return f"{told}: it is as unsure as among so many {unit}s."


def _alone_said(bundle: Bundle) -> str:
    """What the same costs by how common words are."""
    alone, unit = bundle.fields.one("data").one("alone"), _unit(bundle.subject)
    if bundle.subject.text.text("task") == "whole":
        return ""
    bits, nats = alone.number("bits_per_byte"), alone.number("nats")
    if bits is not None:
        return f"By how common each {unit} is alone, it would need {number(bits)} bits."
    return (
        f"By how common each {unit} is alone, it would need {number(nats)} nats." if nats is not None else ""
    )


def _beside(other: Model, subject: Model) -> str:
    """Another model in a sentence, and whether the documents tell the two apart."""
    against, scores = other.text.one("against"), other.text.one("scores")
    more, ends = against.number("more"), against.ends("interval")
    if more is None:
        right = other.scores.number("accuracy")
        return f"{other.label}, beside it, reaches {percent(right, 1)}." if right is not None else ""
    bits = scores.number("bits_per_byte")
    value = bits if bits is not None else scores.number("nats")
    unit = "bits" if bits is not None else "nats"
    how = "more" if more > 0 else "fewer"
    told = f"{other.label}, beside it, needs {number(value)} {unit}, {number(abs(more))} {how}"
    if ends is None:
        return f"{told}."
    sure = "which could be chance" if ends[0] <= 0 <= ends[1] else "which is no chance"
    low, high = sorted((abs(ends[0]), abs(ends[1]))) if ends[0] * ends[1] > 0 else ends
    return f"{told} ({number(low)} to {number(high)}, document by document), {sure}."


def _comparison(models: list[Model]) -> Html:
    """All scores of every model; a column in which nothing was measured is left out."""
    if not models:
        return Html("")
    of = [(model, model.text.one("scores")) for model in models]
    unit = _unit(models[0])
    columns: dict[str, list[Cell]] = {
        "model": [Cell(model.label) for model in models],
        "bits per byte": [numeric(scores.number("bits_per_byte"), 4) for _, scores in of],
        "interval": [_ends(scores.ends("bits_interval")) for _, scores in of],
        f"nats per {unit}": [numeric(scores.number("nats"), 4) for _, scores in of],
        f"perplexity of a {unit}": [numeric(scores.number("perplexity")) for _, scores in of],
        "likeliest right": [shared(scores.number("accuracy"), 1) for _, scores in of],
        "accuracy": [shared(model.scores.number("accuracy"), 1) for model in models],
        "parameters": [_size(model) for model in models],
        "training time": [_seconds(model) for model in models],
        "audit": [_verdict(model) for model in models],
    }
    if all(scores.number("bits_per_byte") is not None for _, scores in of):
        del columns[f"nats per {unit}"]
    kept = {
        name: cells
        for name, cells in columns.items()
        if name in ("model", "audit") or any(cell.shown != NONE for cell in cells)
    }
    rows = [list(row) for row in zip(*kept.values(), strict=True)]
    return tag("div", table("The models side by side", list(kept), rows), class_="headtable")


def _ends(ends: tuple[float, float] | None) -> Cell:
    if ends is None:
        return Cell(NONE)
    return Cell(f"{number(ends[0], 4)} to {number(ends[1], 4)}", ends[0], "n")


def _seconds(model: Model) -> Cell:
    value = model.fields.number("seconds")
    return Cell(duration(value), value, "n")


def context(bundle: Bundle) -> Html:
    """Bits by how far into a window a word stands."""
    lines, said = [], []
    for model in bundle.models:
        points = _positions(model)
        if len(points) < 2:
            continue
        lines.append(
            charts.Series(model.label, [x for x, _, _ in points], [y for _, y, _ in points], model.index)
        )
        first, last = points[0], points[-1]
        said.append(
            f"{model.label}: {number(first[1])} bits at place {first[2]}, {number(last[1])} at {last[2]}."
        )
    if not lines:
        return Html("")
    unit = _unit(bundle.subject)
    axes = charts.Axes("place in the window, as a power of two", zero=True)
    drawn = charts.line_chart(f"Bits for a {unit} by its place in the window", lines, axes, height=210)
    lead = (
        "Look how far to the right the line still falls: that is how much of what it has read the model uses."
    )
    return section(
        "context",
        "What context is worth",
        lead,
        panels(figure(f"Bits for each {unit}", drawn, *said)),
        charts.legend((s.label, s) for s in lines) if len(lines) > 1 else "",
    )


def _positions(model: Model) -> list[tuple[float, float, str]]:
    """Logarithm of the middle of each range of places, bits, and the range in words."""
    found = []
    for part in model.text.one("scores").many("by_position"):
        first, last, nats = part.number("first"), part.number("last"), part.number("nats")
        if first is None or last is None or nats is None or not 1 <= first <= last:
            continue
        where = count(first) if first == last else f"{count(first)} to {count(last)}"
        found.append((math.log2((first + last) / 2), nats / math.log(2), where))
    return found
