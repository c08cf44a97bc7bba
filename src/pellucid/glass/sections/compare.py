"""Several models, each trained from several seeds by one recipe: accuracy, cost and audit side by side."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from pellucid.glass import charts
from pellucid.glass.markup import (
    MINUS,
    NBSP,
    NONE,
    Cell,
    Html,
    count,
    duration,
    figure,
    folded,
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
from pellucid.glass.reading import DESCENDS_FROM, Bundle, Fields

ROLES = {"compress": 0, "sparsify": 1}
"""The same line and mark for a step in every panel."""

VERDICTS = {True: "better", False: "worse", None: "cannot tell"}


@dataclass(frozen=True)
class Entry:
    """One model of the comparison; ``index`` 0 is the one that the others are held against."""

    index: int
    fields: Fields

    @property
    def label(self) -> str:
        return self.fields.text("label") or f"model {self.index + 1}"

    @property
    def role(self) -> int:
        return min(self.index, 1)

    @property
    def outcomes(self) -> list[Fields]:
        return self.fields.many("outcomes")

    @property
    def accuracies(self) -> list[float]:
        return self.each("accuracy")

    @property
    def accuracy(self) -> float | None:
        return self.fields.number("accuracy")

    @property
    def shown(self) -> str:
        """``98.93 ± 0.67 %``."""
        spread = self.fields.number("deviation")
        if self.accuracy is None or spread is None:
            return percent(self.accuracy, 2)
        return f"{percent(self.accuracy, 2).removesuffix(f'{NBSP}%')} ± {100 * spread:.2f}{NBSP}%"

    @property
    def better(self) -> bool | None:
        return self.fields.one("difference").flag("better")

    @property
    def held(self) -> int:
        """Steps with an objective."""
        return max((len(outcome.many("steps")) for outcome in self.outcomes), default=0)

    def each(self, key: str) -> list[float]:
        """A field of every outcome that has it."""
        return [v for outcome in self.outcomes if (v := outcome.number(key)) is not None]

    def mean(self, key: str) -> float | None:
        values = self.each(key)
        return sum(values) / len(values) if values else None

    def by_step(self) -> dict[str, list[tuple[int, list[float]]]]:
        """Step name -> for each layer the share of images on which it fell, one for each seed."""
        found: dict[str, dict[int, list[float]]] = {}
        for outcome in self.outcomes:
            for row in outcome.many("steps"):
                layer, share = row.integer("layer"), row.number("descended")
                if layer is not None and share is not None:
                    found.setdefault(row.text("step", "step"), {}).setdefault(layer, []).append(share)
        return {step: sorted(layers.items()) for step, layers in found.items()}


def entries(bundle: Bundle) -> list[Entry]:
    """The models of the comparison, the first one first."""
    models = bundle.fields.one("comparison").many("models")
    return [Entry(index, fields) for index, fields in enumerate(models)]


# --- the answer -------------------------------------------------------------------------------------------


def compared(bundle: Bundle) -> Html:
    """Title line, the answer in one sentence, what stands behind it, and the table."""
    fields, found = bundle.fields, entries(bundle)
    version = fields.text("version")
    about = [
        fields.text("title", "comparison"),
        fields.text("created"),
        f"pellucid {version}" if version else "",
    ]
    return tag(
        "header",
        tag("p", *(tag("span", part) for part in about if part), class_="kicker"),
        tag("h1", answer(found)),
        paragraph(*_behind(bundle, found), class_="lead"),
        tag("div", _summary(found), class_="headtable") if found else "",
    )


def answer(found: list[Entry]) -> str:
    """``CRATE reaches 98.9 %; of 3 others, 1 does worse and 2 cannot be told from it.``"""
    if not found:
        return "This comparison holds no model."
    first, others = found[0], found[1:]
    reaches = f"{first.label} reaches {percent(first.accuracy, 1)}"
    says = {True: "better", False: "worse"}
    counts = {verdict: [o.label for o in others if o.better is verdict] for verdict in (True, False, None)}
    if not others:
        return f"{reaches}."
    if len(others) == 1:
        better = others[0].better
        rest = "cannot be told from it" if better is None else f"does {says[better]}"
        return f"{reaches}; {others[0].label} {rest}."
    if len(counts[None]) == len(others):
        return f"{reaches}; none of {len(others)} others can be told from it."
    parts = [
        f"{len(counts[v])} {'does' if len(counts[v]) == 1 else 'do'} {says[v]}" for v in says if counts[v]
    ]
    if counts[None]:
        parts.append(f"{len(counts[None])} cannot be told from it")
    return f"{reaches}; of {len(others)} others, {listed(parts)}."


def _behind(bundle: Bundle, found: list[Entry]) -> list[str]:
    comparison = bundle.fields.one("comparison")
    seeds, epochs = len(comparison.values("seeds")), comparison.number("epochs")
    images = next((o.integer("count") for e in found for o in e.outcomes), None)
    on = f" on {plural(images, 'test image')}" if images else ""
    data = comparison.text("data")
    length = "" if epochs is None else f" for {epochs:g} epoch{'' if epochs == 1 else 's'}"
    how = {
        "params": "Widths were chosen so that all have about the same number of parameters.",
        "width": "Each has the sizes that its name stands for.",
    }.get(comparison.text("match"), "")
    return [
        f"Accuracy is the mean of {plural(seeds, 'run')}, one for each seed,{on}"
        f"{f' of {data}' if data else ''}; every model learned by the same recipe{length}.",
        how,
    ]


def _summary(found: list[Entry]) -> Html:
    heads = [
        "model", "accuracy", "points to the first", "", "parameters", "MFLOP", "inference", "audit",
        "non-zero",
    ]  # fmt: skip
    rows = [
        [
            Cell(entry.label),
            Cell(entry.shown, entry.accuracy, "n"),
            *_gap(entry),
            Cell(count(entry.fields.number("parameters")), entry.fields.number("parameters"), "n"),
            _mega(entry.fields.number("flop")),
            _times(entry),
            _verdict(entry),
            shared(entry.fields.number("nonzero")),
        ]
        for entry in found
    ]
    return table("The models side by side", heads, rows)


def _gap(entry: Entry) -> list[Cell]:
    """The difference to the first model with its interval, and the verdict in a word."""
    if entry.index == 0:
        return [Cell(NONE, None, "n"), Cell("")]
    gap = entry.fields.one("difference")
    middle, ends = gap.number("mean"), gap.numbers("interval")
    between = ""
    if len(ends) == 2 and ends[0] is not None and ends[1] is not None:
        between = f" ({_points(ends[0])} to {_points(ends[1])})"
    verdict = tag("span", VERDICTS[entry.better], class_="whole")
    return [Cell(f"{_points(middle)}{between}", middle, "n"), Cell(verdict)]


def _points(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:+.2f}".replace("-", MINUS)


def _mega(value: float | None) -> Cell:
    return numeric(None if value is None else value / 1e6)


def _times(entry: Entry) -> Cell:
    speed = entry.fields.numbers("speed")
    middle = speed[0] if speed else None
    return Cell(NONE if middle is None else f"{middle:.2f}{NBSP}×", middle, "n")


def _verdict(entry: Entry) -> Cell:
    if not entry.held:
        return Cell("no objective")
    fell = [round(v) for v in entry.each("descending")]
    least, most = min(fell, default=0), max(fell, default=0)
    shown = f"{least}" if least == most else f"{least} to {most}"
    whole = least == entry.held
    text = f"{'●' if whole else '▲'}{NBSP}{shown} of {plural(entry.held, 'step')}"
    return Cell(tag("span", text, class_="good" if whole else "warn"), float(sum(fell)))


# --- accuracy ---------------------------------------------------------------------------------------------


def precision(bundle: Bundle) -> Html:
    """Every run's accuracy as a dot, and every difference in words."""
    found = entries(bundle)
    rows = [charts.Dots(e.label, e.accuracies, e.shown, e.role) for e in found if e.accuracies]
    if not rows:
        return Html("")
    lead = (
        "Look for rows whose dots do not mix: a seed moves a model by as much as its dots lie apart, "
        "and a difference smaller than that says nothing."
    )
    drawn = charts.dot_plot("Accuracy of every run", rows, "test accuracy")
    picture = figure(
        "Accuracy of every run",
        drawn,
        "One mark for each seed; the upright line is their mean, the number mean ± standard deviation.",
    )
    return section("accuracy", "Which is more accurate?", lead, panels(picture, _differences(found)))


def _differences(found: list[Entry]) -> Html:
    said = [text for e in found[1:] if (text := e.fields.one("difference").text("text"))]
    if not said:
        return Html("")
    what = (
        "Differences are taken seed by seed. The interval is Student’s t over the seeds: it says how far "
        "other seeds would move the difference on these very images. Where it holds zero, the runs cannot "
        "tell."
    )
    signed = [re.sub(r"-(?=\d+\.\d\d )", MINUS, text) for text in said]
    items = tag("ul", *(tag("li", text) for text in signed))
    return tag("div", tag("h3", "Against the first model"), items, paragraph(what, class_="note"))


# --- cost -------------------------------------------------------------------------------------------------


def cost(bundle: Bundle) -> Html:
    """Accuracy over parameters and over operations, and what training and inference took."""
    found = entries(bundle)
    if not found:
        return Html("")
    lead = "Look up and to the left: more accurate for less."
    many = max((e.fields.number("parameters") or 0.0 for e in found), default=0.0) >= 2e6
    unit, word = (1e6, "millions") if many else (1e3, "thousands")
    drawn = [
        _scatter(found, "parameters", f"parameters, {word}", unit),
        _scatter(found, "flop", "MFLOP for one image", 1e6),
    ]
    pictures = panels(*(part for part in drawn if part)) if any(drawn) else ""
    return section("cost", "What does it cost?", lead, pictures, _cost_table(found), _cost_note(bundle))


def _scatter(found: list[Entry], key: str, x_label: str, unit: float) -> Html:
    spots = [
        charts.Spot(e.label, value / unit, e.accuracy, min(e.accuracies), max(e.accuracies), e.role)
        for e in found
        if (value := e.fields.number(key)) and value > 0 and e.accuracy is not None and e.accuracies
    ]
    if not spots:
        return Html("")
    least = min(spots, key=lambda spot: spot.x)
    most = max(spots, key=lambda spot: spot.x)
    said = f"Least: {least.label}, {number(least.x)}."
    if most.x > least.x:
        said += f" Most: {most.label}, {number(most.x / least.x)} times as much."
    heading = f"Accuracy against {x_label}"
    drawn = charts.scatter(heading, spots, f"{x_label} (logarithmic)")
    return figure(
        heading, drawn, "Mean over the seeds; the bar reaches from the lowest to the highest.", said
    )


def _cost_table(found: list[Entry]) -> Html:
    columns: dict[str, Callable[[Entry], Cell]] = {
        "model": lambda e: Cell(e.label),
        "parameters": lambda e: Cell(
            count(e.fields.number("parameters")), e.fields.number("parameters"), "n"
        ),
        "MFLOP / image": lambda e: _mega(e.fields.number("flop")),
        "training": lambda e: Cell(duration(e.mean("seconds")), e.mean("seconds"), "n"),
        "training images / s": lambda e: numeric(e.mean("images_per_second")),
        "inference images / s": lambda e: numeric(e.fields.number("images_per_second")),
        "times the first": _spread,
    }
    rows = [[make(entry) for make in columns.values()] for entry in found]
    return table("What each took", list(columns), rows)


def _spread(entry: Entry) -> Cell:
    speed = entry.fields.numbers("speed")
    if len(speed) != 3 or any(v is None for v in speed):
        return Cell(NONE)
    return Cell(f"{speed[0]:.2f} ({speed[1]:.2f} to {speed[2]:.2f})", speed[0], "n")


def _cost_note(bundle: Bundle) -> Html:
    machine = [f"{name} {value}" for name, value in bundle.fields.one("comparison").one("machine").items()]
    return paragraph(
        "MFLOP: a million floating point operations in the matrix products, attention and convolutions of "
        "one forward pass; a multiply-add counts two. Training: mean over the seeds, with its evaluations, "
        "each run by itself, so a busy machine shows in it. Inference: all models timed in turns in one "
        "process; times the first model’s speed, median (least to most) of the rounds.",
        f"Taken on: {', '.join(machine)}." if machine else "",
        class_="note",
    )


# --- audit ------------------------------------------------------------------------------------------------


def descent(bundle: Bundle) -> Html:
    """On how many images each step of each model lowered its objective."""
    found = entries(bundle)
    held = [entry for entry in found if entry.held]
    if not found:
        return Html("")
    without = [entry.label for entry in found if not entry.held]
    lead = "Look for lines that stay at the top: there the step lowered its own objective on every image."
    states = "states" if len(without) == 1 else "state"
    said = [_descended(entry) for entry in held]
    if without:
        said.append(f"{listed(without)} {states} no objective for any layer: nothing to hold the layers to.")
    words = tag("ul", *(tag("li", line) for line in said))
    if not held:
        return section("audit", "Does each layer do its work?", "No model here states objectives.", words)
    pictures = panels(*(_lines(entry) for entry in held))
    key = tag(
        "p",
        f"Share of the images on which the step lowered its objective. The dotted line is "
        f"{percent(DESCENDS_FROM)}, from which on a step is said to descend. Lines are means over the seeds, "
        "open marks single seeds.",
        class_="legend",
    )
    return section("audit", "Does each layer do its work?", lead, words, pictures, key, _step_table(held))


def _descended(entry: Entry) -> str:
    fell = entry.each("descending")
    share = percent(entry.fields.number("descended"), 1)
    several = len(fell) > 1
    if all(v == entry.held for v in fell):
        descend = f"all {entry.held} steps descend{' from every seed' if several else ''}"
    else:
        each = ", seed by seed" if several else ""
        descend = f"{listed([count(v) for v in fell])} of {plural(entry.held, 'step')} descend{each}"
    return f"{entry.label}: {descend}; a step lowers its objective on {share} of the images on average."


def _lines(entry: Entry) -> Html:
    lines, loose, worst = [], [], (2.0, "")
    for step, layers in entry.by_step().items():
        role = ROLES.get(step, 2)
        at = [float(layer) for layer, _ in layers]
        means = [sum(shares) / len(shares) for _, shares in layers]
        lines.append(charts.Series(step, at, means, role))
        worst = min(
            [worst, *((m, f"layer {layer} {step}") for m, (layer, _) in zip(means, layers, strict=True))]
        )
        for i in range(max(len(shares) for _, shares in layers) if len(entry.outcomes) > 1 else 0):
            values = [shares[i] if i < len(shares) else None for _, shares in layers]
            loose.append(charts.Series(step, at, values, role))
    reach = sorted({x for line in lines for x in line.x if x is not None})
    ends = [reach[0], reach[-1]]
    asked = charts.Series(percent(DESCENDS_FROM), ends, [DESCENDS_FROM] * 2, 3, faint=True)
    axes = charts.Axes("layer", zero=True, share=True, whole=True)
    title = f"{entry.label}: share of images on which each step lowered its objective, by layer"
    drawn = charts.line_chart(title, [*lines, asked], axes, loose)
    key = charts.legend([(line.label, line) for line in lines])
    return figure(entry.label, tag("div", drawn, key), f"Lowest: {worst[1]}, {percent(worst[0], 1)}.")


def _step_table(held: list[Entry]) -> Html:
    """The numbers behind the lines: one row for each step, one column for each model."""
    where = {
        (layer, step): None
        for entry in held
        for step, layers in entry.by_step().items()
        for layer, _ in layers
    }
    shares = [
        {(layer, step): values for step, layers in entry.by_step().items() for layer, values in layers}
        for entry in held
    ]
    rows = []
    for layer, step in sorted(where, key=lambda key: key[0]):
        cells = []
        for known in shares:
            values = known.get((layer, step), [])
            cells.append(shared(sum(values) / len(values) if values else None, 1))
        rows.append([Cell(f"{layer} {step}", float(layer)), *cells])
    caption = "Share of images on which a step fell, mean over the seeds"
    heads = ["layer and step", *(entry.label for entry in held)]
    return folded("The lines as numbers", table(caption, heads, rows))
