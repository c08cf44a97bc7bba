"""Learning without labels: what went up and down, and whether the features stayed apart."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import groupby

from pellucid.glass import charts
from pellucid.glass.markup import (
    NONE,
    Cell,
    Html,
    figure,
    folded,
    join,
    number,
    numeric,
    panels,
    percent,
    section,
    shared,
    table,
    tag,
)
from pellucid.glass.reading import Bundle, Fields, Model

STATES = {
    "untrained": ("○", "untrained", None),
    "healthy": ("●", "healthy", "good"),
    "idle": ("▲", "nothing learnt", "warn"),
    "collapsing": ("▲", "collapsing", "warn"),
    "collapsed": ("▲", "collapsed", "warn"),
}
"""Mark, word and class of each state; mark and word tell them apart without colour."""


@dataclass(frozen=True)
class Line:
    """A column of the curves, and whether its line is dotted."""

    key: str
    split: str
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    """One picture: its lines over the epochs, and what to know of it.

    It is left out where ``instead_of``, a column that says the same better, is there.
    """

    heading: str
    lines: tuple[Line, ...]
    said: str = ""
    share: bool = False
    zero: bool = True
    instead_of: str = ""


TRAINING = (
    Panel(
        "Loss",
        (Line("loss", "test"), Line("loss", "train", faint=True)),
        "A low loss alone proves nothing: features that are all alike may have it too.",
        zero=False,
    ),
    Panel(
        "Alignment of views",
        (Line("alignment", "train"),),
        "Mean cosine between views of one image, behind the projector.",
        zero=False,
    ),
    Panel(
        "Coding rate, share of its ceiling",
        (Line("rate share", "train"),),
        "The ceiling is the rate of features that fill all directions alike.",
        share=True,
    ),
    Panel(
        "Coding rates",
        (Line("rate", "train"), Line("class rate", "train", faint=True)),
        "In nats. Solid: of all features together. Dotted: of the views of one image, on average.",
        instead_of="rate share",
    ),
    Panel("Agreement on hidden patches", (Line("patches", "train"),), "Mean cosine.", zero=False),
    Panel(
        "Prototypes in use",
        (Line("prototypes used", "train"),),
        "So many, used alike, would have the same entropy.",
    ),
)
"""Of batches as they were learnt from."""

TEST = (
    Panel("Effective rank", (Line("effective rank", "test"),), "How many directions the features use."),
    Panel(
        "Cosines",
        (Line("view cosine", "test"), Line("cosine", "test", faint=True)),
        "Solid: between views of one image. Dotted: between different images, which must stay below.",
        zero=False,
    ),
    Panel(
        "Spread of norms",
        (Line("norm spread", "test"),),
        "Standard deviation of the features’ lengths over their mean.",
    ),
    Panel("Nearest neighbours’ accuracy", (Line("knn accuracy", "test"),), share=True, zero=False),
)
"""Of test images as they are, or of their views."""


def health(bundle: Bundle) -> Html:
    """Verdict, what it was at every evaluation, and the curves of every model that learnt without labels."""
    models = [model for model in bundle.models if model.unlabelled]
    groups = [
        (heading, [drawn for panel in chosen if (drawn := _panel(panel, models))])
        for heading, chosen in (("On training batches", TRAINING), ("On test images", TEST))
    ]
    if not models or not any(drawn for _, drawn in groups):
        return Html("")
    lead = (
        "Look whether the features of different images stay apart: without labels that, and not a low loss, "
        "tells a run that learns from one that collapses."
    )
    body = [join([tag("h3", heading, class_="group"), panels(*drawn)]) for heading, drawn in groups if drawn]
    entries = [(model.label, charts.Series(model.label, [], [], model.index)) for model in models]
    return section(
        "learning",
        "Learning, and whether it is well",
        lead,
        join([_states(model, named=len(models) > 1) for model in models]),
        *body,
        charts.legend(entries, _band_note(bundle.subject)) if len(models) > 1 else _note(bundle.subject),
        *(_numbers(model) for model in models),
    )


def verdict(model: Model) -> Html:
    """The last verdict in its own words."""
    sign, _, class_ = STATES.get(model.health.text("state"), ("", "", None))
    text = model.health.text("text")
    if not text:
        return Html("")
    said = f"{sign} {text[:1].upper()}{text[1:]}.".strip()
    return tag("p", said, class_=f"verdict {class_}" if class_ else "verdict")


def _evaluations(model: Model) -> list[tuple[float, str]]:
    """Epoch and state of each evaluation that was judged."""
    curve = model.fields.one("curves").one("test")
    pairs = zip(curve.numbers("epoch"), curve.texts("health"), strict=False)
    return [(epoch, state) for epoch, state in pairs if epoch is not None and state]


def _states(model: Model, *, named: bool) -> Html:
    """Stretches of the run with one state each: ``○ untrained at the start  ● healthy, epochs 1 to 60``."""
    shown = []
    for state, stretch in groupby(_evaluations(model), key=lambda pair: pair[1]):
        epochs = [epoch for epoch, _ in stretch]
        sign, word, class_ = STATES.get(state, ("", state, None))
        first, last = (charts.number_tick(round(epoch, 1)) for epoch in (epochs[0], epochs[-1]))
        when = f"epoch {first}" if first == last else f"epochs {first} to {last}"
        shown.append(tag("span", tag("span", f"{sign} {word}".strip(), class_=class_), f", {when}"))
    if not shown:
        return Html("")
    return tag("p", tag("b", f"{model.label}: ") if named else "", *shown, class_="states")


def _bands(model: Model) -> list[charts.Band]:
    """Where the subject was not well: from the evaluation before to the one that found it."""
    found = []
    judged = _evaluations(model)
    before = judged[0][0] if judged else 0.0
    for epoch, state in judged:
        if STATES.get(state, ("", "", None))[2] == "warn":
            found.append(charts.Band(before, epoch, STATES[state][1]))
        before = epoch
    return found


def _band_note(model: Model) -> str:
    return f"Shaded: epochs in which {model.label} was not well." if _bands(model) else ""


def _note(model: Model) -> Html:
    return tag("p", note, class_="note") if (note := _band_note(model)) else Html("")


def _panel(panel: Panel, models: list[Model]) -> Html:
    if any(_column(model, Line(panel.instead_of, "train")).points for model in models):
        return Html("")
    lines = [_column(model, line) for model in models for line in panel.lines]
    lines = [series for series in lines if series.points]
    if not lines:
        return Html("")
    if all(series.faint for series in lines):  # nothing to be told from
        lines = [replace(series, faint=False) for series in lines]
    long = max(x for series in lines for x, _ in series.points) >= 4
    axes = charts.Axes("epoch", zero=panel.zero, share=panel.share, whole=long)
    title = f"{panel.heading} over the epochs"
    drawn = charts.line_chart(title, lines, axes, height=210, bands=_bands(models[0]))
    splits = {line.split for line in panel.lines}
    both = len(splits) > 1 and any(series.faint for series in lines)
    which = "Solid: test images. Dotted: training batches." if both else ""
    return figure(panel.heading, drawn, which, panel.said, *(_said(model, panel) for model in models))


def _column(model: Model, line: Line) -> charts.Series:
    curve = model.fields.one("curves").one(line.split)
    name = f"{model.label}, {line.key}"
    return charts.Series(name, curve.numbers("epoch"), curve.numbers(line.key), model.index, line.faint)


def _said(model: Model, panel: Panel) -> str:
    """First and last value in words."""
    show = (lambda v: percent(v, 1)) if panel.share else number
    values = next(
        ([y for _, y in c.points] for line in panel.lines if (c := _column(model, line)).points), []
    )
    if not values:
        return ""
    width = model.features.integer("width") if panel.lines[0].key == "effective rank" else None
    of = f" of {width}" if width else ""
    if len(values) == 1:
        return f"{model.label}: {show(values[0])}{of}."
    return f"{model.label}: {show(values[0])} at first, {show(values[-1])}{of} at the end."


def _numbers(model: Model) -> Html:
    """Every evaluation, with the training values last logged before it."""
    curves = model.fields.one("curves")
    test, train = curves.one("test"), curves.one("train")
    epochs = test.numbers("epoch")
    if not epochs:
        return Html("")
    of_train, of_test = _keys(TRAINING, train, "train"), _keys((*TRAINING, *TEST), test, "test")
    logged = [epoch if epoch is not None else float("inf") for epoch in train.numbers("epoch")]
    states = test.texts("health") or [""] * len(epochs)
    rows = []
    for i, epoch in enumerate(epochs):
        last = bisect_right(logged, epoch) - 1 if epoch is not None else -1
        cells = [_cell(train, key, last) for key in of_train] + [_cell(test, key, i) for key in of_test]
        state = STATES.get(states[i] if i < len(states) else "", ("", NONE, None))
        rows.append([numeric(epoch), Cell(f"{state[0]} {state[1]}".strip()), *cells])
    both = set(of_train) & set(of_test)
    heads = ["epoch", "state", *of_train, *(f"test {key}" if key in both else key for key in of_test)]
    caption = f"Evaluations of {model.label}"
    return folded(f"The curves of {model.label} as numbers", table(caption, heads, rows))


def _keys(chosen: tuple[Panel, ...], curve: Fields, split: str) -> list[str]:
    keys = dict.fromkeys(line.key for panel in chosen for line in panel.lines if line.split == split)
    return [key for key in keys if any(value is not None for value in curve.numbers(key))]


def _cell(curve: Fields, key: str, row: int) -> Cell:
    values = curve.numbers(key)
    value = values[row] if 0 <= row < len(values) else None
    return shared(value, 1) if key in ("knn accuracy", "rate share") else numeric(value)
