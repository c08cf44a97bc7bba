"""One fitted estimator: what it reaches, in words and numbers, and its pictures."""

from __future__ import annotations

from pellucid.glass import charts
from pellucid.glass.markup import (
    Cell,
    Html,
    count,
    duration,
    figure,
    is_picture,
    number,
    panels,
    paragraph,
    percent,
    plural,
    section,
    table,
    tag,
)
from pellucid.glass.reading import Bundle, Fields, finite, sequence, words

MAX_CHARACTERS = 2_000_000
"""Of a picture; a larger one is left out."""

_UNITS = {"share": lambda v: percent(v, 1), "count": count, "seconds": duration}


def fitted(bundle: Bundle) -> Html:
    """Title line, the answer in one sentence, what was fitted to what, and the numbers."""
    fields, fit = bundle.fields, bundle.fields.one("fit")
    version = fields.text("version")
    about = [fields.text("title", "fit"), fields.text("created"), f"pellucid {version}" if version else ""]
    return tag(
        "header",
        tag("p", *(tag("span", part) for part in about if part), class_="kicker"),
        tag("h1", fit.text("answer") or f"{fields.text('title', 'This bundle')} holds no estimator."),
        paragraph(fit.text("does"), _rows(fit.one("rows")), class_="lead"),
        tag("div", _measures(fit.many("measures")), class_="headtable") if fit.many("measures") else "",
    )


def _rows(rows: Fields) -> str:
    """``Fitted on 1,347 images of 8 × 8 pixels, measured on 450 others.``"""
    fitted_on, measured_on = rows.integer("train"), rows.integer("test")
    if fitted_on is None:
        return ""
    size = " × ".join(count(side) for side in rows.numbers("size") if side is not None)
    said = f"Fitted on {count(fitted_on)} {rows.text('kind', 'rows')}"
    said += f" of {size} pixels" if size else ""
    said += " in colour" if rows.integer("channels") == 3 else ""
    dims, width = rows.integer("dims"), rows.integer("width")
    if dims is not None and width is not None and dims < width:
        said += f", as {plural(dims, 'principal coordinate')} of each"
    return said + (f", measured on {count(measured_on)} others." if measured_on else ".")


def _measures(measures: list[Fields]) -> Html:
    rows: list[list[Cell | str]] = [[m.text("name", "value"), _value(m), m.text("meaning")] for m in measures]
    return table("What was measured", ["", "value", "what it is"], rows, sort=False)


def _value(measure: Fields) -> Cell:
    value = measure.number("value")
    return Cell(_UNITS.get(measure.text("unit"), number)(value), value, "n")


def pictures(bundle: Bundle) -> Html:
    """Every figure of the fit, side by side where there is room."""
    fit = bundle.fields.one("fit")
    drawn = [part for part in map(_drawn, fit.many("figures")) if part]
    return section("pictures", "What it found", fit.text("lead"), panels(*drawn)) if drawn else Html("")


def _drawn(fields: Fields) -> Html:
    make = {"sheet": _sheet, "lines": _lines, "map": _map, "bars": _bars}.get(fields.text("kind"))
    picture = make(fields) if make is not None else Html("")
    heading = fields.text("heading", "Picture")
    return (
        figure(heading, picture, fields.text("said"), wide=bool(fields.flag("wide"))) if picture else Html("")
    )


def _sheet(fields: Fields) -> Html:
    raw = fields.raw("png")
    if not is_picture(raw, MAX_CHARACTERS):
        return Html("")
    return tag(
        "div", tag("img", src=raw, alt=fields.text("heading", "pictures"), class_="coarse"), class_="scroll"
    )


def _lines(fields: Fields) -> Html:
    lines = [
        charts.Series(line.text("label", "value"), line.numbers("x"), line.numbers("y"), role)
        for role, line in enumerate(fields.many("lines"))
    ]
    flags = {key: bool(fields.flag(key)) for key in ("zero", "share", "log", "whole")}
    drawn = charts.line_chart(fields.text("heading"), lines, charts.Axes(fields.text("x_label"), **flags))
    if not drawn or len(lines) < 2:
        return drawn
    return tag("div", drawn, charts.legend([(line.label, line) for line in lines]))


def _map(fields: Fields) -> Html:
    names = [words(name) for name in fields.values("names")]
    rows = [[max(finite(v) or 0.0, 0.0) for v in sequence(row)] for row in fields.values("counts")]
    if not names or len(rows) != len(names) or any(len(row) != len(names) for row in rows):
        return Html("")
    title = fields.text("heading")
    drawn = charts.heat_map(title, names, rows, fields.text("x_label"), fields.text("y_label"))
    return tag("div", drawn, class_="scroll", role="region", tabindex=0, aria_label=title)


def _bars(fields: Fields) -> Html:
    bars = [
        (bar.text("label", "?"), value)
        for bar in fields.many("bars")
        if (value := bar.number("value")) is not None
    ]
    return charts.bar_chart(fields.text("heading"), bars) if bars else Html("")
