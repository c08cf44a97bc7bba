"""Accuracy by class, and which classes are taken for which."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from pellucid.glass import charts
from pellucid.glass.markup import (
    Cell,
    Html,
    count,
    figure,
    folded,
    panels,
    percent,
    plural,
    section,
    shared,
    table,
    tag,
)
from pellucid.glass.reading import Bundle, Fields, Model, finite, sequence

MAX_CLASSES = 30
"""Above this a confusion map cannot be read, and the extremes are listed instead."""

WORST = 15
"""How many of the worst classes and strongest confusions are listed."""


@dataclass(frozen=True)
class Confusion:
    """``count`` images of ``true`` were taken for ``predicted``: ``share`` of that class."""

    true: str
    predicted: str
    count: float
    share: float


def accuracy(bundle: Bundle) -> Html:
    """Per-class table and confusions of the subject."""
    model = bundle.subject
    classes, matrix = model.scores.many("classes"), _matrix(model)
    if not classes and not matrix:
        return Html("")
    names = _names(bundle, model, max(len(classes), len(matrix)))
    few = max(len(classes), len(matrix)) <= MAX_CLASSES
    lead = (
        "Look for pale cells on the diagonal and marked cells off it: "
        "those are the classes that are taken for others."
        if few and matrix
        else "Look at the worst classes first: the average hides them."
    )
    drawn = [_map(model, matrix, names) if few else "", _bars(classes, names)]
    pictures = panels(*(part for part in drawn if part)) if any(drawn) else ""
    heading = "Accuracy by class" if classes else "Which classes are taken for which"
    if model.scores.text("by") == "neighbours":
        heading += ", by nearest neighbours"
    tables = tag("div", _class_table(classes, names), _confusions(matrix, names), class_="beside")
    numbers = _matrix_table(matrix, names) if few else ""
    return section("accuracy", heading, lead, pictures, tables, numbers, _note() if classes else "")


def _matrix(model: Model) -> list[list[float]]:
    """The confusion counts as a square, zero where one is missing."""
    rows = [sequence(row) for row in model.scores.values("confusion")]
    n = max([len(rows), *(len(row) for row in rows)], default=0)
    whole = [[max(finite(v) or 0.0, 0.0) for v in row] + [0.0] * (n - len(row)) for row in rows]
    return whole + [[0.0] * n for _ in range(n - len(rows))] if rows and n else []


def _names(bundle: Bundle, model: Model, n: int) -> list[str]:
    """Class names from the scores, else from the data, else their numbers."""
    scored = [c.text("name") for c in model.scores.many("classes")]
    given = [str(c) for c in bundle.fields.one("data").values("classes") if c is not None]
    named = scored if any(scored) else given
    return [named[i] if i < len(named) and named[i] else str(i) for i in range(n)]


def _worst_first(classes: list[Fields], names: list[str], key: str) -> list[tuple[str, Fields]]:
    """The classes by ``key``, the lowest first; those without a value last."""

    def order(pair: tuple[str, Fields]) -> float:
        value = pair[1].number(key)
        return math.inf if value is None else value

    return sorted(zip(names, classes, strict=False), key=order)


def _bars(classes: list[Fields], names: list[str]) -> Html:
    """What was missed of each class; drawn as errors, because bars of 97 and 99 % all look alike."""
    pairs = [(name, c.number("recall")) for name, c in _worst_first(classes, names, "recall")]
    missed = [(name, max(1.0 - recall, 0.0)) for name, recall in pairs if recall is not None]
    if not missed or missed[0][1] == 0.0:
        return Html("")
    heading = (
        "Missed images by class"
        if len(missed) <= MAX_CLASSES
        else f"Missed images, the {WORST} worst classes"
    )
    shown = missed if len(missed) <= MAX_CLASSES else missed[:WORST]
    most = f"Most: {charts.clip(missed[0][0], 60)}, {percent(missed[0][1], 1)}."
    said = f"Share of the images of a class that were taken for another. {most}"
    return figure(heading, charts.bar_chart(heading, shown), said)


def _map(model: Model, matrix: list[list[float]], names: list[str]) -> Html:
    if not matrix:
        return Html("")
    wrong = sum(v for i, row in enumerate(matrix) for j, v in enumerate(row) if i != j)
    total = sum(map(sum, matrix))
    title = f"Confusion map of {model.label}: {count(wrong)} of {count(total)} images off the diagonal"
    drawn = tag(
        "div",
        charts.heat_map(title, names[: len(matrix)], matrix, "predicted", "true"),
        class_="scroll",
        role="region",
        tabindex=0,
        aria_label="Confusion map",
    )
    said = (
        f"{count(wrong)} of {plural(round(total), 'image')} off the diagonal; shaded by share of the class."
    )
    return figure("True class against prediction", drawn, said, wide=len(names) > 10)


def _class_table(classes: list[Fields], names: list[str]) -> Html:
    if not classes:
        return Html("")
    pairs = list(zip(names, classes, strict=False))
    caption = "Every class"
    if len(classes) > MAX_CLASSES:
        pairs = _worst_first(classes, names, "f1")[:WORST]
        caption = f"The {len(pairs)} worst of {plural(len(classes), 'class', 'classes')}, by F1"
    rows = [
        [
            Cell(name),
            Cell(count(c.number("count")), c.number("count"), "n"),
            shared(c.number("precision"), 1),
            shared(c.number("recall"), 1),
            shared(c.number("f1"), 1),
        ]
        for name, c in pairs
    ]
    return table(caption, ["class", "images", "precision", "recall", "F1"], rows)


def _note() -> Html:
    what = (
        "Precision: of the images called this class, the share that are. Recall: of the images of this "
        "class, the share that were found. F1: the harmonic mean of both."
    )
    return tag("p", what, class_="note")


def _strongest(matrix: list[list[float]], names: list[str]) -> list[Confusion]:
    """The largest entries off the diagonal, the largest first."""
    off = ((v, i, j) for i, row in enumerate(matrix) for j, v in enumerate(row) if i != j and v > 0)
    top = heapq.nlargest(WORST, off, key=lambda entry: entry[0])
    return [Confusion(names[i], names[j], v, v / sum(matrix[i])) for v, i, j in top]


def _confusions(matrix: list[list[float]], names: list[str]) -> Html:
    strongest = _strongest(matrix, names)
    if not strongest:
        return Html("")
    rows = [
        [Cell(c.true), Cell(c.predicted), Cell(count(c.count), c.count, "n"), shared(c.share, 1)]
        for c in strongest
    ]
    return table(
        "The strongest confusions", ["true class", "taken for", "images", "share of the class"], rows
    )


def _matrix_table(matrix: list[list[float]], names: list[str]) -> Html:
    if not matrix:
        return Html("")
    rows = [
        [Cell(name), *(Cell(count(v) if v else "·", v, "n") for v in row)]
        for name, row in zip(names, matrix, strict=False)
    ]
    caption = "Confusion counts: rows are true classes, columns predictions"
    return folded(
        "The confusion map as numbers",
        table(caption, ["", *charts.shorten(names[: len(matrix)], 16)], rows, sort=False),
    )
