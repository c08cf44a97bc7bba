"""Learning curves: loss, or bits per byte, and accuracy on training and test data."""

from __future__ import annotations

from pellucid.glass import charts
from pellucid.glass.markup import Html, figure, number, panels, percent, section
from pellucid.glass.reading import Bundle, Model

FALLS, RISES = ("bits per byte", "loss"), ("accuracy", "word accuracy")
"""What is drawn of a run: of both the first that was measured."""


def learning(bundle: Bundle) -> Html:
    """Two panels, every model in both."""
    (falls, loss), (rises, accuracy) = (_measured(bundle.models, keys) for keys in (FALLS, RISES))
    drawn = [_panel(falls, loss), _panel(rises, accuracy), _close_up(accuracy)]
    drawn = [panel for panel in drawn if panel]
    if not drawn:
        return Html("")
    lead = (
        "Look at the gap: where the dotted training line goes on improving and the solid test line does not, "
        f"the model learns its training {bundle.subject.sample}s by heart."
    )
    lines = {(s.label, s.faint): s for s in (*loss, *accuracy) if s.points}
    return section(
        "learning",
        "Learning curves",
        lead,
        panels(*drawn),
        charts.legend((s.label, s) for s in lines.values()),
    )


def _measured(models: list[Model], keys: tuple[str, ...]) -> tuple[str, list[charts.Series]]:
    found = [(key, _lines(models, key)) for key in keys]
    return next((each for each in found if any(series.points for series in each[1])), found[0])


def _lines(models: list[Model], key: str) -> list[charts.Series]:
    lines = []
    for model in models:
        for split in ("test", "train"):
            curve = model.fields.one("curves").one(split)
            name = f"{model.label}, {'training' if split == 'train' else 'test'}"
            lines.append(
                charts.Series(name, curve.numbers("epoch"), curve.numbers(key), model.index, split == "train")
            )
    return lines


def _panel(key: str, lines: list[charts.Series]) -> Html:
    share = key in RISES
    values = [y for series in lines for _, y in series.points]
    # A loss that falls by more than a factor of fifty shows its end only on a logarithmic axis.
    log = not share and bool(values) and min(values) > 0 and max(values) > 50 * min(values)
    axes = charts.Axes("epoch", zero=not share and not log, share=share, log=log)
    drawn = charts.line_chart(
        f"{key.capitalize()} over the epochs, training and test", lines, axes, height=210
    )
    said = [_said(series, key) for series in lines if not series.faint and series.points]
    scale = "Logarithmic axis." if log else ""
    return figure(key.capitalize(), drawn, scale, *said) if drawn else Html("")


def _close_up(lines: list[charts.Series]) -> Html:
    """The accuracy in the second half of the run, where the whole picture shows only a flat line."""
    points = [p for series in lines for p in series.points]
    if not points:
        return Html("")
    middle = (min(x for x, _ in points) + max(x for x, _ in points)) / 2
    late = [_after(series, middle) for series in lines]
    values = [y for series in late for _, y in series.points]
    whole = max(y for _, y in points) - min(y for _, y in points)
    if len(values) < 6 or max(values) - min(values) > 0.3 * whole:
        return Html("")
    title = "Accuracy in the second half, training and test"
    drawn = charts.line_chart(title, late, charts.Axes("epoch", share=True), height=210)
    return figure(
        "Accuracy, second half",
        drawn,
        "The same, later epochs only; this axis does not start at zero.",
    )


def _after(series: charts.Series, start: float) -> charts.Series:
    points = [(x, y) for x, y in series.points if x >= start]
    return charts.Series(
        series.label, [x for x, _ in points], [y for _, y in points], series.role, series.faint
    )


def _said(series: charts.Series, key: str) -> str:
    """The best and the last value in words."""
    best = max(series.points, key=lambda p: p[1]) if key in RISES else min(series.points, key=lambda p: p[1])
    last = series.points[-1]
    show = (lambda v: percent(v, 1)) if key in RISES else number
    if best[1] == last[1]:
        return f"{series.label}: best at the end, {show(last[1])}."
    return f"{series.label}: best {show(best[1])} at epoch {best[0]:.3g}, {show(last[1])} at the end."
