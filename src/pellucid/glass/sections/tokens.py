"""What happens to the tokens from the first layer to the last."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from pellucid.glass import charts
from pellucid.glass.markup import Html, figure, folded, number, panels, percent, section, tag
from pellucid.glass.reading import Bundle, Fields, Model


@dataclass(frozen=True)
class Measure:
    """A column of the audit that is drawn over the layers."""

    key: str
    heading: str
    meaning: str
    share: bool = False

    @property
    def show(self) -> Callable[[float | None], str]:
        return (lambda v: percent(v, 1)) if self.share else number


MEASURES = (
    Measure("coding_rate", "Coding rate R", "Nats to code all tokens of {sample}; lower means more compact."),
    Measure("nonzero", "Share of non-zeros", "Lower means sparser.", share=True),
    Measure("rank", "Numerical rank", "How many directions the tokens of {sample} really use."),
    Measure("coherence", "Coherence of the subspaces", "0: the heads’ subspaces share no direction."),
    Measure(
        "outliers",
        "High-norm tokens",
        "Tokens far longer than the rest; they spoil attention maps.",
        share=True,
    ),
)


def tokens(bundle: Bundle) -> Html:
    """Small multiples over the layers, then spectra and norms of the subject."""
    drawn = [panel for measure in MEASURES if (panel := _panel(bundle.models, measure))]
    subject, *others = bundle.models or [bundle.subject]
    more = [_spectra(subject), _norms(subject)]
    more += [
        folded(f"Spectra and norms of {other.label}", *parts)
        for other in others
        if any(parts := (_spectra(other), _norms(other)))
    ]
    if not drawn and not any(more):
        return Html("")
    lead = (
        "Look for a steady trend: from layer to layer the tokens should become cheaper to code and sparser, "
        "without a sudden jump."
    )
    key = _legend(bundle.models) if drawn else ""
    body = [panels(*drawn) if drawn else "", key, *more]
    return section("tokens", "What happens to the tokens through the layers", lead, *body)


def _legend(models: list[Model]) -> Html:
    shown = [m for m in models if m.rows]
    note = (
        "Filled marks stand at the end of a layer, small open ones after its first step; "
        "all numbers are in the audit’s table."
    )
    return charts.legend([(m.label, charts.Series(m.label, [], [], m.index)) for m in shown], note)


def _places(model: Model) -> list[float | None]:
    """Where each row stands on the axis of layers: the last step of layer 3 at 3, the first of two at 2.5."""
    in_layer: dict[int | None, int] = {}
    for row in model.rows:
        in_layer[row.layer] = in_layer.get(row.layer, 0) + 1
    seen: dict[int | None, int] = {}
    places: list[float | None] = []
    for row in model.rows:
        seen[row.layer] = seen.get(row.layer, 0) + 1
        places.append(None if row.layer is None else row.layer - 1 + seen[row.layer] / in_layer[row.layer])
    return places


def _panel(models: list[Model], measure: Measure) -> Html:
    lines, marks, said = [], [], []
    for model in models:
        places = _places(model)
        values = [row.fields.number(measure.key) for row in model.rows]
        ends = [
            (x, v)
            for x, v in zip(places, values, strict=True)
            if x is not None and v is not None and x == round(x)
        ]
        between = [
            (x, v)
            for x, v in zip(places, values, strict=True)
            if x is not None and v is not None and x != round(x)
        ]
        if ends:
            lines.append(charts.Series(model.label, *_columns(ends), model.index))
            said.append(_trend(model, measure, ends))
        marks.append(charts.Series(model.label, *_columns(between), model.index))
    axes = charts.Axes("layer", zero=True, share=measure.share, whole=True)
    title = f"{measure.heading} over the layers"
    drawn = charts.line_chart(title, lines, axes, marks)
    sample = "a text" if models and models[0].sample == "text" else "an image"
    meaning = measure.meaning.replace("{sample}", sample)
    return figure(measure.heading, drawn, meaning, *said) if drawn else Html("")


def _columns(points: list[tuple[float, float]]) -> tuple[list[float | None], list[float | None]]:
    return [x for x, _ in points], [v for _, v in points]


def _trend(model: Model, measure: Measure, ends: list[tuple[float, float]]) -> str:
    first, last = ends[0], ends[-1]
    if first[0] == last[0]:
        return f"{model.label}: {measure.show(last[1])} after layer {last[0]:g}."
    if measure.show(first[1]) == measure.show(last[1]):
        return f"{model.label}: {measure.show(last[1])} after the first layer and after the last."
    start, end = measure.show(first[1]), measure.show(last[1])
    return f"{model.label}: {start} after layer {first[0]:g}, {end} after layer {last[0]:g}."


def _spectra(model: Model) -> Html:
    """One panel per kind of step: singular values relative to the largest, the later the layer the darker."""
    given = [s for s in model.audit.many("spectra") if _values(s)]
    steps = list(dict.fromkeys(s.text("step") for s in given))
    drawn = [_spectrum(model, step, [s for s in given if s.text("step") == step]) for step in steps]
    drawn = [panel for panel in drawn if panel]
    if not drawn:
        return Html("")
    what = (
        "Singular values of the tokens, each spectrum divided by its largest value. A line that drops early "
        "means that the tokens live in few directions. Pale lines are early layers, strong lines late ones."
    )
    return tag("div", _opening(f"Spectra: {model.label}", what), panels(*drawn))


def _opening(heading: str, what: str) -> Html:
    return tag("div", tag("h3", heading, class_="group"), tag("p", what), class_="opening")


def _values(spectrum: Fields) -> list[float]:
    return sorted((v for v in spectrum.numbers("singular_values") if v is not None and v > 0), reverse=True)


def _spectrum(model: Model, step: str, spectra: list[Fields]) -> Html:
    lines = []
    for i, spectrum in enumerate(spectra):
        values = _values(spectrum)
        # Below a ten-thousandth the values are rounding, and would only stretch the axis.
        relative: list[float | None] = [v / values[0] if v >= 1e-4 * values[0] else None for v in values]
        opacity = 1.0 if len(spectra) == 1 else 0.2 + 0.8 * i / (len(spectra) - 1)
        index: list[float | None] = [float(n) for n in range(1, len(values) + 1)]
        lines.append(
            charts.Series(f"layer {spectrum.text('layer')}", index, relative, model.index, opacity=opacity)
        )
    halves = [_directions(_values(s)) for s in (spectra[0], spectra[-1])]
    said = (
        f"Nine tenths of the energy lie in {halves[0]} directions after layer {spectra[0].text('layer', '?')}"
    )
    said += f" and in {halves[1]} after layer {spectra[-1].text('layer', '?')}." if len(spectra) > 1 else "."
    title = f"{model.label}: singular values of the tokens after {step}, relative to the largest"
    drawn = charts.line_chart(
        title, list(reversed(lines)), charts.Axes("index of the singular value", log=True, whole=True)
    )
    return figure(f"after {step}" if step else "spectrum", drawn, said) if drawn else Html("")


def _directions(values: list[float]) -> int:
    """How many of the largest directions hold nine tenths of the squared norm."""
    whole, held = sum(v * v for v in values), 0.0
    for i, v in enumerate(values, start=1):
        held += v * v
        if held >= 0.9 * whole:
            return i
    return len(values)


def _norms(model: Model) -> Html:
    """A small histogram per layer and step on one axis, so that a few long tokens stand out."""
    given = [(h, *_histogram(h)) for h in model.audit.many("norms")]
    given = [(h, edges, counts) for h, edges, counts in given if edges and sum(counts) > 0]
    if not given:
        return Html("")
    ends = min(edges[0] for _, edges, _ in given), max(edges[-1] for _, edges, _ in given)
    ends = ends if ends[1] > ends[0] else (ends[0] - 0.5, ends[1] + 0.5)
    drawn = []
    for fields, edges, counts in given:
        name = f"layer {fields.text('layer', '?')} {fields.text('step')}".strip()
        median = number(_quantile(edges, counts, 0.5))
        title = f"{model.label}, {name}: histogram of token norms, median {median}"
        drawn.append(
            figure(name, charts.histogram(title, edges, counts, ends, model.index), f"median {median}")
        )
    what = (
        "Lengths of the tokens. A few columns far to the right of the rest are the high-norm tokens that "
        "disturb attention maps."
    )
    return tag(
        "div",
        _opening(f"Token norms: {model.label}", what),
        tag("div", *drawn, class_="panels small"),
    )


def _histogram(fields: Fields) -> tuple[list[float], list[float]]:
    """Edges and counts; both empty unless they fit each other and the edges ascend."""
    edges, counts = fields.numbers("edges"), [max(c or 0.0, 0.0) for c in fields.numbers("counts")]
    whole = [e for e in edges if e is not None]
    fits = len(whole) == len(edges) == len(counts) + 1 > 1 and all(a <= b for a, b in pairwise(whole))
    return (whole, counts) if fits else ([], [])


def _quantile(edges: list[float], counts: list[float], share: float) -> float:
    """The value below which ``share`` of the counts lie, linear inside a column."""
    wanted, below = share * sum(counts), 0.0
    for a, b, c in zip(edges[:-1], edges[1:], counts, strict=True):
        if c > 0 and below + c >= wanted:
            return a + (b - a) * (wanted - below) / c
        below += c
    return math.nan
