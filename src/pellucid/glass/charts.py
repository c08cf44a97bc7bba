"""Pictures as inline SVG (and, for attention maps, as tiny PNGs): numbers in, markup out.

Every chart is at most ``WIDTH`` pixels wide, so that one fills a phone and three a desktop page at the
same size of type; only a confusion map of many classes is wider. Colours are classes (``s0`` the subject,
``s1`` and on the others, ``warn``) that the page's style sheet fills in for light, dark and print. Nothing
is told by colour alone: models differ in the shape of their marks and the dash of their lines, and a rising
step is a triangle.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from pellucid.glass.markup import Html, join, number, percent, tag

WIDTH = 330
"""Width of a chart in px: two side by side on A4, three on a desktop page, one on a phone."""

MAX_POINTS = 240
"""A line is thinned to at most this many points."""

SHAPES = ("circle", "square", "diamond", "cross")


@dataclass(frozen=True)
class Series:
    """A line: ``y`` over ``x`` with gaps where either is ``None``; ``role`` 0 is the subject's."""

    label: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    role: int = 0
    faint: bool = False
    opacity: float = 1.0

    @property
    def points(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in zip(self.x, self.y, strict=False) if x is not None and y is not None]


@dataclass(frozen=True)
class Band:
    """A stretch of the horizontal axis in which something was the matter, and what."""

    start: float
    end: float
    label: str


@dataclass(frozen=True)
class Scale:
    """A map from values ``low..high`` to pixels ``start..end``, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = math.log(max(value, self.low)) if self.log else value
        return self.start + (self.end - self.start) * (value - low) / ((high - low) or 1.0)

    def ticks(self, most: int) -> list[float]:
        """Round values inside the scale, at most ``most`` + 1 of them."""
        if not self.high > self.low:
            return [self.low]
        return _log_ticks(self.low, self.high, most + 2) if self.log else _ticks(self.low, self.high, most)


def _ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for multiples in ((1, 2, 5), (1,)):
        ticks = [m * 10.0**e for e in range(first, last + 1) for m in multiples]
        ticks = [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
        if 2 <= len(ticks) <= most + 1:
            return ticks
    if len(ticks) < 2:
        return _ticks(low, high, most)
    return ticks[:: math.ceil(len(ticks) / (most + 1))]


def _spread(
    values: Sequence[float], *, zero: bool = False, log: bool = False, most: int = 4
) -> tuple[float, float]:
    """Ends of an axis that holds all values, widened to round ticks; never of length zero."""
    low, high = min(values), max(values)
    if log:
        return (low, high) if high > low * 1.01 else (low / 1.2, high * 1.2)
    low = min(low, 0.0) if zero else low
    if high - low <= 1e-9 * max(abs(high), abs(low), 1e-9):
        pad = abs(high) * 0.1 or 1.0
        low, high = (low if zero else low - pad), high + pad
    ticks = _ticks(low, high, most)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else high - low
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _svg(title: str, width: float, height: float, *children: str) -> Html:
    box = {"viewBox": f"0 0 {width:g} {height:g}"}
    return tag(
        "svg", tag("title", title), *children, width=width, height=height, role="img", aria_label=title, **box
    )


def _text(x: float, y: float, text: str, anchor: str = "start", class_: str | None = None) -> Html:
    return tag("text", text, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def clip(text: str, most: int) -> str:
    """``text`` cut in its middle to ``most`` characters, because names often differ only at their ends."""
    if len(text) <= most:
        return text
    tail = (most - 1) // 3
    return text[: most - 1 - tail] + "…" + text[len(text) - tail :]


def shorten(names: Sequence[str], most: int) -> list[str]:
    """Names cut to ``most`` characters that can still be told apart: what all of them share is cut first."""
    if all(len(name) <= most for name in names):
        return list(names)
    ahead = _shared(names)
    behind = _shared([name[ahead:][::-1] for name in names])
    ahead, behind = (ahead if ahead > 3 else 0), (behind if behind > 3 else 0)
    if len(set(names)) < 2:
        ahead = behind = 0
    cores = [name[ahead : len(name) - behind] for name in names]
    return [clip(f"{'…' if ahead else ''}{core}{'…' if behind else ''}", most) for core in cores]


def _shared(names: Sequence[str]) -> int:
    """How many characters all names start with in common."""
    together = zip(*names, strict=False)
    return sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, together))


def _shape(shape: str, x: float, y: float, size: float, class_: str) -> Html:
    if shape == "circle":
        return tag("circle", cx=x, cy=y, r=size, class_=class_)
    if shape == "square":
        return tag("rect", x=x - size, y=y - size, width=2 * size, height=2 * size, class_=class_)
    if shape == "diamond":
        d = round(size * 1.35, 1)
        path = f"M{x:.1f} {y - d:.1f}l{d} {d}l{-d} {d}l{-d} {-d}z"
        return tag("path", d=path, class_=class_)
    a, b = size, 2 * size
    path = f"M{x - a:.1f} {y - a:.1f}l{b} {b}m0 {-b}l{-b} {b}"
    return tag("path", d=path, class_=f"{class_} cross")


def mark(role: int, x: float, y: float, *, open_: bool = False, size: float = 3.5, extra: str = "") -> Html:
    """A model's mark; the shape says which model, an open one the value in the middle of a layer."""
    class_ = " ".join(part for part in (f"m s{min(role, 3)}", "open" if open_ else "", extra) if part)
    return _shape(SHAPES[min(role, 3)], x, y, size, class_)


def legend(entries: Iterable[tuple[str, Series]], note: str = "") -> Html:
    """What the lines mean, as a line of text with a sample of each, and a note on the marks."""
    shown = []
    for text, series in entries:
        sample = tag(
            "svg",
            _path([(1.0, 6.0), (27.0, 6.0)], series),
            "" if series.faint else mark(series.role, 14, 6),
            width=28,
            height=12,
            aria_hidden="true",
        )
        shown.append(tag("span", sample, " ", text))
    return tag("p", *shown, tag("span", note) if note else "", class_="legend")


def _path(points: Sequence[tuple[float, float]], series: Series) -> Html:
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    class_ = f"l s{min(series.role, 3)}{' faint' if series.faint else ''}"
    return tag("path", d=d, class_=class_, stroke_opacity=series.opacity if series.opacity < 1 else None)


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most ``MAX_POINTS`` points: of every stretch its lowest and highest, and always the last point."""
    if len(points) <= MAX_POINTS:
        return points
    stretch = math.ceil(2 * len(points) / MAX_POINTS)
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _segments(series: Series) -> list[list[tuple[float, float]]]:
    """The line cut where a value is missing."""
    parts: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(series.x, series.y, strict=False):
        if x is None or y is None:
            parts.append([])
        else:
            parts[-1].append((x, y))
    return [_thin(part) for part in parts if part]


@dataclass(frozen=True)
class Axes:
    """How a line chart is measured out: names, units, and whether its values are shares or spread widely."""

    x_label: str
    zero: bool = False
    share: bool = False
    log: bool = False
    whole: bool = False


def line_chart(
    title: str,
    lines: Sequence[Series],
    axes: Axes,
    marks: Sequence[Series] = (),
    height: int = 190,
    bands: Sequence[Band] = (),
) -> Html:
    """Lines over a common axis. ``marks`` are further values that no line joins, ``bands`` shade a part.

    With ``axes.log`` values that are not positive are left out. Empty if nothing is left to draw.
    """
    lines, marks = [_positive(s, axes.log) for s in lines], [_positive(s, axes.log) for s in marks]
    points = [p for series in (*lines, *marks) for p in series.points]
    if not points:
        return Html("")
    xs = [x for x, _ in points]
    left, right = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 0.5, max(xs) + 0.5)
    y = Scale(*_spread([v for _, v in points], zero=axes.zero, log=axes.log), height - 36, 10, axes.log)
    x = Scale(left, right, 52, WIDTH - 10)
    drawn = [_curve(series, x, y, dots=len(series.points) <= 26) for series in reversed(lines)]
    loose = [mark(s.role, x(a), y(b), open_=True, size=2.8) for s in reversed(marks) for a, b in s.points]
    shaded = [_shaded(band, x, y) for band in bands if band.end > left and band.start < right]
    return _svg(title, WIDTH, height, *shaded, _grid(x, y, axes, height), *drawn, *loose)


def _shaded(band: Band, x: Scale, y: Scale) -> Html:
    start, end = x(max(band.start, x.low)), x(min(band.end, x.high))
    box = {"x": start, "y": y.end, "width": max(end - start, 2.0), "height": y.start - y.end}
    return tag("rect", tag("title", band.label), class_="band", **box)


def _positive(series: Series, log: bool) -> Series:
    if not log:
        return series
    y = [v if v is not None and v > 0 else None for v in series.y]
    return Series(series.label, series.x, y, series.role, series.faint, series.opacity)


def _curve(series: Series, x: Scale, y: Scale, *, dots: bool) -> Html:
    parts = [[(x(a), y(b)) for a, b in part] for part in _segments(series)]
    if not parts:
        return Html("")
    # A point without neighbours has no line: it shows only as a mark.
    alone = [part[0] for part in parts if len(part) == 1]
    marked = [p for part in parts for p in part] if dots else [*alone, parts[-1][-1]]
    shapes = [] if series.faint or series.opacity < 1 else [mark(series.role, *p) for p in marked]
    name = tag("title", series.label)
    return tag("g", name, *(_path(part, series) for part in parts if len(part) > 1), *shapes)


def _grid(x: Scale, y: Scale, axes: Axes, height: int) -> Html:
    show = percent_tick if axes.share else number_tick
    out = []
    for value in y.ticks(4):
        out.append(_line(x.start - 8, y(value), x.end, y(value), "rule"))
        out.append(_text(x.start - 14, y(value) + 3.5, show(value), "end"))
    ticks = [t for t in x.ticks(6) if not axes.whole or t == round(t)]
    out += [_text(x(value), height - 20, number_tick(value), "middle") for value in ticks]
    out.append(_text((x.start + x.end) / 2, height - 4, axes.x_label, "middle", "axis"))
    return tag("g", *out, aria_hidden="true")


def number_tick(value: float) -> str:
    """A round number as short as it can be."""
    if value != 0 and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return number(value, 1)
    return f"{value:,.10g}".replace(",", "\u202f").replace("-", "\u2212")


def percent_tick(value: float) -> str:
    """A round share in percent, as short as it can be."""
    return f"{100 * value:.6g}\u202f%".replace("-", "\u2212")


@dataclass(frozen=True)
class Pair:
    """One row of a before/after picture: the value after, in units of the value before."""

    label: str
    ratio: float | None
    state: str | None
    change: str
    share: str
    samples: str = "images"


def dumbbell_chart(title: str, pairs: Sequence[Pair], domain: tuple[float, float]) -> Html:
    """Per row the value after, joined to the line of the value before: a dot if it fell, a triangle if not.

    ``domain`` are the smallest and largest ratio of the whole figure, so that its panels share one axis.
    """
    top, step = 24, 22
    bottom = top + step * len(pairs)
    low, high = min(domain[0], 1.0), max(domain[1], 1.0)
    pad = 0.06 * (high - low) or 0.05
    log = high > 4 * low > 0
    span = (low / 1.1, high * 1.1) if log else (max(low - pad, 0.0), high + pad)
    x = Scale(*span, 28, WIDTH - 112, log)
    rows = [_dumbbell(pair, x, top + step * (i + 0.5)) for i, pair in enumerate(pairs)]
    ticks = [
        _text(x(t), bottom + 16, number_tick(t), "middle")
        for t in x.ticks(4)
        if abs(x(t) - x(1)) > 16 or t == 1
    ]
    frame = tag(
        "g",
        *(_line(x(t), top, x(t), bottom, "rule") for t in x.ticks(4)),
        _line(x(1), top - 4, x(1), bottom + 4, "base"),
        _text(0, 12, "layer", class_="axis"),
        _text(x(1), 12, "before", "middle", "axis"),
        _text(WIDTH - 56, 12, "change", "end", "axis"),
        _text(WIDTH, 12, "fell on", "end", "axis"),
        *ticks,
        _text((x.start + x.end) / 2, bottom + 33, "after ÷ before", "middle", "axis"),
        aria_hidden="true",
    )
    return _svg(title, WIDTH, bottom + 40, frame, *rows)


def _dumbbell(pair: Pair, x: Scale, y: float) -> Html:
    warn = "warn" if pair.state == "rises" else None
    label = _text(8, y + 4, pair.label, "middle", class_=warn)
    words = [_text(WIDTH - 56, y + 4, pair.change, "end", warn), _text(WIDTH, y + 4, pair.share, "end", warn)]
    if pair.ratio is None:
        return tag("g", label, _text(x.start, y + 4, "not measured", class_="axis"), *words)
    name = tag("title", f"layer {pair.label}: {pair.change}, fell on {pair.share} of the {pair.samples}")
    at = x(pair.ratio)
    bar = _line(x(1), y, at, y, f"bar {warn or 's0'}")
    before = tag("circle", cx=x(1), cy=y, r=2.5, class_="m before")
    if pair.state == "rises":
        after = tag("path", d=f"M{at:.1f} {y - 6:.1f}l6 10.5h-12z", class_="m warn")
    else:
        after = mark(0, at, y, open_=pair.state == "partly", size=4.5)
    return tag("g", name, label, bar, before, after, *words)


def interval_bar(
    low: float | None, value: float, high: float | None, ends: tuple[float, float], role: int
) -> Html:
    """A value with its interval on an axis from ``ends[0]`` to ``ends[1]``, small enough for a table cell."""
    width, y = 170, 11
    x = Scale(*ends, 6, width - 6)
    title = f"{percent(value, 1)}" + (
        "" if low is None or high is None else f", {percent(low, 1)} to {percent(high, 1)}"
    )
    whisker = (
        ""
        if low is None or high is None
        else join(
            [
                _line(x(low), y, x(high), y, f"bar s{min(role, 3)}"),
                *(_line(x(end), y - 4, x(end), y + 4, f"bar s{min(role, 3)}") for end in (low, high)),
            ]
        )
    )
    return _svg(
        title, width, 22, _line(x.start, y, x.end, y, "rule"), whisker, mark(role, x(value), y, size=4.2)
    )


@dataclass(frozen=True)
class Dots:
    """One row of a dot plot: every value as a dot, their mean as a line across, said on the right."""

    label: str
    values: Sequence[float]
    said: str
    role: int = 1


def dot_plot(title: str, rows: Sequence[Dots], x_label: str) -> Html:
    """Shares as dots on a common axis, a row for each series with its name above. Empty without values."""
    values = [value for row in rows for value in row.values]
    if not values:
        return Html("")
    step = 40
    bottom = step * len(rows)
    low, high = _spread(values)
    x = Scale(max(low, 0.0), high, 8, WIDTH - 8)
    ticks = x.ticks(5)
    names = shorten([row.label for row in rows], 30)
    drawn = []
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = step * i + 26
        middle = x(sum(row.values) / len(row.values)) if row.values else None
        drawn.append(
            tag(
                "g",
                tag("title", f"{row.label}: {', '.join(percent(v, 2) for v in row.values)}"),
                _text(0, y - 13, name),
                _text(WIDTH, y - 13, row.said, "end"),
                _line(x.start, y, x.end, y, "rule"),
                "" if middle is None else _line(middle, y - 8, middle, y + 8, f"bar s{min(row.role, 3)}"),
                *(mark(row.role, x(value), y, open_=True, size=4) for value in row.values),
            )
        )
    axis = [_text(x(t), bottom + 12, percent_tick(t), "middle") for t in ticks]
    axis.append(_text((x.start + x.end) / 2, bottom + 28, x_label, "middle", "axis"))
    return _svg(title, WIDTH, bottom + 32, *drawn, tag("g", *axis, aria_hidden="true"))


@dataclass(frozen=True)
class Spot:
    """A named point of a scatter plot, with the lowest and highest value that its ``y`` is the mean of."""

    label: str
    x: float
    y: float
    low: float
    high: float
    role: int = 1


def scatter(title: str, spots: Sequence[Spot], x_label: str, height: int = 250) -> Html:
    """Shares over positive numbers (logarithmic), each point with its name beside it where there is room."""
    if not spots:
        return Html("")
    xs, ys = [s.x for s in spots], [v for s in spots for v in (s.low, s.high)]
    left, right = min(xs), max(xs)
    wide = (left / 1.35, right * 1.35)
    x = Scale(*wide, 52, WIDTH - 10, log=True)
    y = Scale(*_spread(ys), height - 36, 12)
    names = shorten([s.label for s in spots], 22)
    taken = [(x(s.x) - 6, y(s.y) - 6, x(s.x) + 6, y(s.y) + 6) for s in spots]
    drawn = []
    for spot, name in zip(spots, names, strict=True):
        at, middle = x(spot.x), y(spot.y)
        box = _room(at, middle, 6.2 * len(name), taken)
        taken.append(box)
        drawn.append(
            tag(
                "g",
                tag("title", f"{spot.label}: {percent(spot.y, 2)} at {number(spot.x)}"),
                _line(at, y(spot.low), at, y(spot.high), f"bar s{min(spot.role, 3)}"),
                mark(spot.role, at, middle, size=4.2),
                _text(box[0], box[3] - 3, name),
            )
        )
    axes = Axes(x_label, share=True, log=True)
    return _svg(title, WIDTH, height, _grid(x, y, axes, height), *drawn)


Box = tuple[float, float, float, float]


def _room(x: float, y: float, width: float, taken: Sequence[Box]) -> Box:
    """Where a name of that width covers nothing, as near to its point as may be; else right of the point."""
    places = []
    for down in (0, -12, 12, -24, 24, -36, 36):
        for left in (x + 9, x - 9 - width, x - width / 2):
            if left == x - width / 2 and abs(down) < 12:
                continue
            if left >= 0 and left + width <= WIDTH:
                places.append((left, y + down - 7, left + width, y + down + 7))
    for place in places:
        if not any(_overlap(place, other) for other in taken):
            return place
    return (x + 9, y - 7, x + 9 + width, y + 7)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


CLASSES = 10
"""Classes that are told apart on a map, by colour and shape."""


@dataclass(frozen=True)
class Cloud:
    """The points of one class; ``number`` chooses colour and shape, None those of the rest."""

    label: str
    points: Sequence[tuple[float, float]]
    number: int | None


def class_mark(number: int | None, x: float, y: float, size: float = 3.2) -> Html:
    """A class's mark."""
    if number is None:
        return _shape("circle", x, y, size - 1, "m k")
    return _shape(SHAPES[number % len(SHAPES)], x, y, size, f"m k k{number % CLASSES}")


def point_map(title: str, clouds: Sequence[Cloud], height: int = 300) -> Html:
    """Points in a plane, both axes of one scale; a name stands in the middle of its class."""
    points = [p for cloud in clouds for p in cloud.points]
    if not points:
        return Html("")
    x, y = _plane([p[0] for p in points], [p[1] for p in points], WIDTH, height)
    drawn, names = [], []
    for cloud in clouds:
        marks = [
            class_mark(cloud.number, x(a), y(b)) if len(clouds) > 1 else mark(0, x(a), y(b), size=3.2)
            for a, b in cloud.points
        ]
        drawn.append(tag("g", tag("title", cloud.label), *marks))
        if cloud.number is not None and cloud.points:
            a, b = (sorted(values)[len(values) // 2] for values in zip(*cloud.points, strict=True))
            names.append(_text(x(a), y(b) + 4, clip(cloud.label, 14), "middle", "halo"))
    frame = tag("rect", x=0.5, y=0.5, width=WIDTH - 1, height=height - 1, class_="frame")
    return _svg(title, WIDTH, height, frame, *drawn, *names)


def _plane(xs: Sequence[float], ys: Sequence[float], width: float, height: float) -> tuple[Scale, Scale]:
    """Scales for both axes, as large as fits, with the points in the middle."""
    pad = 14
    wide, high = max(xs) - min(xs), max(ys) - min(ys)
    unit = min((width - 2 * pad) / (wide or 1e-12), (height - 2 * pad) / (high or 1e-12))
    reach = (width / unit / 2, height / unit / 2)
    across, up = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
    return (
        Scale(across - reach[0], across + reach[0], 0, width),
        Scale(up - reach[1], up + reach[1], height, 0),
    )


def class_legend(clouds: Sequence[Cloud]) -> Html:
    """What the marks of a map mean."""
    shown = []
    for cloud in clouds:
        sample = tag("svg", class_mark(cloud.number, 6, 6, 4), width=12, height=12, aria_hidden="true")
        shown.append(tag("span", sample, " ", clip(cloud.label, 40)))
    return tag("p", *shown, class_="legend")


@dataclass(frozen=True)
class Tile:
    """A picture (data URI) on a grid; ``coarse`` keeps its pixels squares."""

    label: str
    column: int
    row: int
    picture: str
    coarse: bool


def tile_map(title: str, tiles: Sequence[Tile], columns: int, rows: int, width: int = 685) -> Html:
    """Pictures at their places on a grid of cells."""
    if not tiles:
        return Html("")
    cell = width / columns
    height = round(cell * rows)
    drawn = []
    for tile in tiles:
        place = {"x": tile.column * cell + 1, "y": tile.row * cell + 1, "width": cell - 2, "height": cell - 2}
        class_ = "coarse" if tile.coarse else None
        image = tag("image", tag("title", tile.label), href=tile.picture, class_=class_, **place)
        drawn.append(image)
    frame = tag("rect", x=0.5, y=0.5, width=width - 1, height=height - 1, class_="frame")
    return _svg(title, width, height, frame, *drawn)


def bar_chart(title: str, bars: Sequence[tuple[str, float]]) -> Html:
    """Horizontal bars of shares from zero, one row each: the name on the left, the value on the right."""
    step, room = 20, 7.0
    names = shorten([name for name, _ in bars], 18)
    left = max(26.0, 14 + room * max((len(name) for name in names), default=0))
    x = Scale(0.0, max([value for _, value in bars] + [1e-9]), left, WIDTH - 56)
    rows = []
    for i, ((full, value), name) in enumerate(zip(bars, names, strict=True)):
        y = step * i
        rows.append(
            tag(
                "g",
                tag("title", f"{full}: {percent(value, 1)}"),
                _text(left - 8, y + 14, name, "end"),
                tag(
                    "rect",
                    x=x.start,
                    y=y + 4,
                    width=max(x(value) - x.start, 1.0),
                    height=12,
                    class_="fill s0",
                ),
                _text(x(max(value, 0.0)) + 8, y + 14, percent(value, 1)),
            )
        )
    return _svg(title, WIDTH, step * len(bars) + 4, *rows)


def heat_map(
    title: str, names: Sequence[str], counts: Sequence[Sequence[float]], x_label: str, y_label: str
) -> Html:
    """A confusion map with counts: darker for a larger share of the row, off the diagonal as a warning."""
    n = len(names)
    cell = 26 if n <= 10 else 22 if n <= 16 else 18
    short = shorten(names, 16)
    longest = max((len(name) for name in short), default=1)
    margin = 26 + max(10.0, 7.0 * longest)
    turned = longest > 2
    top = margin if turned else 36.0
    size = margin + cell * n + 4
    body = [tag("rect", x=margin, y=top, width=cell * n, height=cell * n, class_="frame")]
    for i, row in enumerate(counts):
        total = sum(row) or 1.0
        for j, value in enumerate(row):
            if value > 0:
                what = f"{y_label} {names[i]}, {x_label} {names[j]}: {number_tick(value)}"
                body.append(
                    _heat_cell(margin + cell * j, top + cell * i, cell, value, value / total, i == j, what)
                )
    labels = [_text(margin - 6, top + cell * (i + 0.5) + 4, name, "end") for i, name in enumerate(short)]
    for j, name in enumerate(short):
        at = margin + cell * (j + 0.5)
        turn = {"transform": f"translate({at + 4:g} {top - 6:g}) rotate(-90)"}
        labels.append(tag("text", name, **turn) if turned else _text(at, top - 6, name, "middle"))
    middle = top + cell * n / 2
    side = tag(
        "text",
        y_label,
        text_anchor="middle",
        class_="axis",
        transform=f"translate(11 {middle:g}) rotate(-90)",
    )
    heading = _text(margin + cell * n / 2, 11, x_label, "middle", "axis")
    return _svg(title, size, top + cell * n + 4, *body, *labels, side, heading)


def _heat_cell(x: float, y: float, cell: int, value: float, share: float, right: bool, what: str) -> Html:
    class_ = "hit" if right else "miss"
    strength = round(0.14 + 0.86 * min(share, 1.0), 2)
    square = tag(
        "rect", x=x + 0.5, y=y + 0.5, width=cell - 1, height=cell - 1, class_=class_, fill_opacity=strength
    )
    shown = number_tick(value)
    # Three digits fill a cell of 26 px; what does not fit is in the title and in the table.
    fits = 6.4 * len(shown) <= cell - 2
    ink = "on" if strength > 0.55 else None
    text = _text(x + cell / 2, y + cell / 2 + 4, shown, "middle", ink) if fits else ""
    return tag("g", tag("title", what), square, text)


def histogram(
    title: str, edges: Sequence[float], counts: Sequence[float], ends: tuple[float, float], role: int = 0
) -> Html:
    """Columns over ``ends``, an axis that several histograms share; the highest column fills the height."""
    width, height = 152, 74
    x, top = Scale(*ends, 2, width - 2), max(max(counts), 1e-12)
    y = Scale(0.0, top, height - 17, 4)
    columns = [
        tag(
            "rect",
            x=x(a),
            y=y(c),
            width=max(x(b) - x(a) - 0.5, 0.5),
            height=y.start - y(c),
            class_=f"fill s{min(role, 3)}",
        )
        for a, b, c in zip(edges[:-1], edges[1:], counts, strict=True)
        if c > 0
    ]
    axis = [
        _line(x.start, y.start, x.end, y.start, "base"),
        _text(x.start, height - 3, number(ends[0], 2)),
        _text(x.end, height - 3, number(ends[1], 2), "end"),
    ]
    return _svg(title, width, height, *columns, *axis)


def pixel_map(values: Sequence[float], columns: int, alt: str) -> Html:
    """A grid of non-negative values as an image: white is zero, darkest its own largest value.

    A PNG of some 300 bytes, because a thousand maps of 200 SVG squares would weigh 10 MB.
    """
    top = max(max(values), 1e-12)
    levels = bytes(round((len(_RAMP) // 3 - 1) * min(max(value / top, 0.0), 1.0)) for value in values)
    rows = [levels[i : i + columns] for i in range(0, len(levels), columns)]
    # Some PDF viewers smooth small images, so a pixel of the grid is made several of the image.
    zoom = max(1, 48 // max(columns, len(rows)))
    wide = [bytes(level for level in row for _ in range(zoom)) for row in rows]
    data = base64.b64encode(_png([row for row in wide for _ in range(zoom)])).decode("ascii")
    return tag("img", src=f"data:image/png;base64,{data}", alt=alt)


def _ramp(steps: int = 32) -> bytes:
    """A palette from white over the accent blue to near black, as RGB triples."""
    stops = ((255, 255, 255), (150, 186, 217), (38, 98, 156), (10, 28, 54))
    colours = []
    for i in range(steps):
        part, within = divmod(i * (len(stops) - 1) / (steps - 1), 1)
        a, b = stops[int(part)], stops[min(int(part) + 1, len(stops) - 1)]
        colours += [round(p + (q - p) * within) for p, q in zip(a, b, strict=True)]
    return bytes(colours)


_RAMP = _ramp()


def _png(rows: Sequence[bytes]) -> bytes:
    """An 8-bit palette PNG (ISO/IEC 15948) of ``_RAMP`` indices."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"PLTE", _RAMP)
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


__all__ = [
    "Axes",
    "Band",
    "Cloud",
    "Dots",
    "Pair",
    "Series",
    "Spot",
    "Tile",
    "bar_chart",
    "class_legend",
    "class_mark",
    "dot_plot",
    "dumbbell_chart",
    "heat_map",
    "histogram",
    "interval_bar",
    "legend",
    "line_chart",
    "pixel_map",
    "point_map",
    "scatter",
    "tile_map",
]
