"""What the atoms of each layer respond to, beside the hidden units of a model that has no dictionary."""

from __future__ import annotations

from collections.abc import Callable

from pellucid.glass import charts
from pellucid.glass.markup import (
    NONE,
    Cell,
    Html,
    count,
    figure,
    folded,
    join,
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
from pellucid.glass.reading import Bundle, Fields, Model, sequence, words
from pellucid.glass.sections.passage import Word, level_of, one_line, passage, quoted

KINDS = {"atoms": "atom", "units": "unit"}

SCORE = (
    "An atom’s score: from one half of the texts a list is made that gives each word the atom’s mean "
    "response at it, and the score is the correlation of what the list says with its responses in the other "
    "half. A list goes by the word itself or by the word that follows; the better one counts. 1: the word "
    "says all."
)


def atoms(bundle: Bundle) -> Html:
    """Scores and shares over the layers, a table, and atoms with their contexts."""
    models = [model for model in bundle.models if _layers(model)]
    if not models:
        return Html("")
    unit = bundle.subject.text.text("unit", "word")
    lead = "Look whether the contexts of an atom have something in common that can be said in a few words."
    drawn = [
        _panel(
            models,
            "score",
            "How far a list of words explains an atom",
            "Mean score of those that ever fire.",
            number,
        ),
        _panel(
            models,
            "fires",
            f"Share of {unit}s at which an atom responds",
            "Lower means sparser.",
            lambda value: percent(value, 1),
            share=True,
        ),
    ]
    key = charts.legend([(m.label, charts.Series(m.label, [], [], m.index)) for m in models])
    shown = [_shown(model) for model in models]
    body = [
        block if model.index == 0 else folded(f"The same for {model.label}", block)
        for model, block in zip(models, shown, strict=True)
        if block
    ]
    drawn = [panel for panel in drawn if panel]
    picture = join([panels(*drawn), key]) if drawn else ""
    return section(
        "atoms", "What its atoms respond to", lead, paragraph(SCORE), picture, _table(models, unit), *body
    )


def _layers(model: Model) -> list[Fields]:
    return model.text.many("atoms")


def _panel(
    models: list[Model],
    key: str,
    heading: str,
    meaning: str,
    show: Callable[[float | None], str],
    share: bool = False,
) -> Html:
    lines, said = [], []
    for model in models:
        points = [
            (float(layer), value)
            for fields in _layers(model)
            if (layer := fields.integer("layer")) is not None and (value := fields.number(key)) is not None
        ]
        if not points:
            continue
        lines.append(charts.Series(model.label, [x for x, _ in points], [y for _, y in points], model.index))
        mean = sum(y for _, y in points) / len(points)
        said.append(f"{model.label}: {show(mean)} in the mean of its layers.")
    drawn = charts.line_chart(heading, lines, charts.Axes("layer", zero=True, share=share, whole=True))
    return figure(heading, drawn, meaning, *said) if drawn else Html("")


def _table(models: list[Model], unit: str) -> Html:
    rows = []
    for model in models:
        for fields in _layers(model):
            total, dead = fields.number("count"), fields.number("dead")
            quartiles = fields.numbers("quartiles")
            between = (
                f"{number(quartiles[0], 2)} to {number(quartiles[2], 2)}"
                if len(quartiles) == 3 and None not in quartiles
                else NONE
            )
            rows.append(
                [
                    Cell(model.label),
                    Cell(fields.text("layer", "?"), fields.number("layer"), "n"),
                    Cell(f"{count(total)} {fields.text('kind')}".strip(), total),
                    Cell(count(dead), dead, "n"),
                    shared(fields.number("fires"), 1),
                    numeric(fields.number("score")),
                    Cell(between, quartiles[0] if between != NONE else None, "n"),
                    shared(fields.number("clear")),
                ]
            )
    heads = ["model", "layer", "has", "never fire", "fire at", "mean score", "middle half", "above 0.5"]
    read = [p for m in models for f in _layers(m) if (p := f.integer("positions")) is not None]
    note = f"Read from {plural(max(read), unit)} of held-out text. " if read else ""
    return tag(
        "div",
        table("Atoms of every layer", heads, rows),
        paragraph(f"{note}Fire at: mean share of {unit}s at which one responds.", class_="note"),
    )


def _shown(model: Model) -> Html:
    """A foldable block for each layer, the last one open."""
    layers = _layers(model)
    blocks = []
    for i, fields in enumerate(layers):
        groups = [
            (heading, [_atom(atom, fields, model) for atom in fields.many(key)])
            for key, heading in (("clearest", "The highest scores"), ("middle", "From the middle"))
        ]
        drawn = [
            part
            for heading, each in groups
            if each
            for part in (tag("h3", heading), tag("div", *each, class_="atoms"))
        ]
        if drawn:
            name = f"Layer {fields.text('layer', '?')}"
            blocks.append(tag("details", tag("summary", name), *drawn, open=i == len(layers) - 1))
    return tag("div", *blocks) if blocks else Html("")


def _atom(fields: Fields, layer: Fields, model: Model) -> Html:
    """Its numbers in a sentence, the words it speaks for, and its strongest contexts."""
    kind = KINDS.get(layer.text("kind"), "atom")
    contexts = fields.many("contexts")
    top = max((c.number("value") or 0.0 for c in contexts), default=0.0)
    lines = [_context(context, top) for context in contexts]
    heading = f"{kind} {fields.text('atom', '?')}"
    score, fires = fields.number("score"), fields.number("fires")
    numbers = [f"score {number(score, 2)}" if score is not None else "", f"fires at {percent(fires, 1)}"]
    head = tag("p", tag("b", heading), *(tag("span", part) for part in numbers if part), class_="kicker")
    return tag(
        "div", head, paragraph(_common(fields, model), _pushes(fields), class_="note"), *lines, class_="atom"
    )


def _common(fields: Fields, model: Model) -> str:
    """What most of its strongest contexts share."""
    word, purity, base = fields.text("word"), fields.number("purity"), fields.number("common")
    if not word or purity is None:
        return ""
    where = "stand before" if fields.text("told_by") == "next" else "stand at"
    unit = model.text.text("unit", "word")
    beside = f", which is {percent(base, 1)} of all {unit}s" if base is not None else ""
    return f"{percent(purity)} of its strongest contexts {where} {quoted(word)}{beside}."


def _pushes(fields: Fields) -> str:
    named = []
    for side in ("for", "against"):
        pairs = [sequence(pair) for pair in fields.one("pushes").values(side)]
        texts = [quoted(charts.clip(words(pair[0]), 20)) for pair in pairs if len(pair) == 2]
        if texts:
            named.append(f"{side} {', '.join(texts)}")
    return f"Speaks {', '.join(named)}." if named else ""


def _context(context: Fields, top: float) -> Html:
    value = context.number("value")
    level = level_of(value or 0.0, top)
    said = f"response {number(value)}" if value is not None else ""
    before, word, after = (one_line(context.text(key)) for key in ("before", "word", "after"))
    shown = [
        Word(before, class_="given"),
        Word(word, max(level, 1), said, "reader"),
        Word(after, class_="given"),
    ]
    return passage([word for word in shown if word.text], "a", "context")
