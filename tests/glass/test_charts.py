"""Scales, names and pixels of the charts."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from pellucid.glass import charts, markup


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.97, 0.99), (-3, 1e6), (1e-14, 3e-14), (5, 5 + 1e-6)])
def test_ticks_lie_inside_and_are_few(low: float, high: float) -> None:
    ticks = charts.Scale(low, high, 0, 100).ticks(4)
    assert 2 <= len(ticks) <= 5
    assert all(low - 1e-6 * (high - low) <= tick <= high + 1e-6 * (high - low) for tick in ticks)


@pytest.mark.parametrize(("low", "high"), [(0.02, 2.3), (1e-6, 1e6), (0.5, 0.7)])
def test_logarithmic_ticks(low: float, high: float) -> None:
    scale = charts.Scale(low, high, 0, 100, log=True)
    ticks = scale.ticks(4)
    assert 2 <= len(ticks) <= 7
    assert [scale(low), scale(high)] == pytest.approx([0, 100])


def test_long_names_can_still_be_told_apart() -> None:
    names = [f"Prunus_domestica_subspecies_{i}_from_the_north" for i in range(12)]
    short = charts.shorten(names, 16)
    assert len(set(short)) == 12
    assert max(map(len, short)) <= 16
    assert charts.shorten(["cat", "dog"], 16) == ["cat", "dog"]
    assert charts.shorten(["x" * 40, "x" * 40], 16) == [charts.clip("x" * 40, 16)] * 2


def test_a_map_shows_its_grid() -> None:
    drawn = charts.pixel_map([0.0, 0.5, 1.0, 0.0, 0.0, 0.25], 3, "a map")
    data = re.search(r"base64,([^\"]+)", drawn)
    assert data
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1]))).convert("L")).astype(int)
    rows, columns = image.shape
    cells = image[rows // 4 :: rows // 2, columns // 6 :: columns // 3]
    assert cells.shape == (2, 3)
    assert cells[0, 0] == cells[1, 0] == cells[1, 1] == 255
    assert cells[0, 2] < cells[0, 1] < cells[1, 2] < 255


def test_a_long_line_is_thinned_but_keeps_its_extremes() -> None:
    x = [float(i) for i in range(10_000)]
    y = [5.0 if i == 777 else -5.0 if i == 4321 else 0.0 for i in range(10_000)]
    drawn = charts.line_chart("t", [charts.Series("l", x, y)], charts.Axes("x"))
    path = re.search(r'class="l s0"', drawn)
    assert path
    assert len(drawn) < 10_000
    heights = [float(v) for v in re.findall(r"[ML][\d.]+ ([\d.]+)", drawn)]
    assert (min(heights), max(heights)) == pytest.approx((10, 154), abs=8)


def test_missing_values_cut_the_line() -> None:
    series = charts.Series("l", [1, 2, 3, 4, 5], [1, 2, None, 2, 1])
    drawn = charts.line_chart("t", [series], charts.Axes("x"))
    assert drawn.count('class="l s0"') == 2
    assert charts.line_chart("t", [charts.Series("l", [1], [None])], charts.Axes("x")) == ""


def test_a_rising_step_is_a_triangle_and_a_falling_one_a_dot() -> None:
    pairs = [charts.Pair("1", 0.9, "falls", "−10 %", "100 %"), charts.Pair("2", 1.1, "rises", "+10 %", "3 %")]
    drawn = charts.dumbbell_chart("t", pairs, (0.9, 1.1))
    assert drawn.count('class="m s0"') == 1
    assert len(re.findall(r'<path d="[^"]*z" class="m warn"', drawn)) == 1


@pytest.mark.parametrize(
    ("share", "decimals", "shown"),
    [(1.0, 0, "100 %"), (0.9996, 0, ">99 %"), (0.9999, 1, ">99.9 %"), (0.0, 1, "0.0 %"), (0.0004, 0, "<1 %"),
     (0.982, 1, "98.2 %"), (None, 0, "–"), (-0.05, 0, "−5 %")],
)  # fmt: skip
def test_a_share_is_never_rounded_to_all_or_none(share: float | None, decimals: int, shown: str) -> None:
    assert markup.percent(share, decimals).replace("\u202f", "").replace("\u00a0", " ") == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(88.24, "88.2"), (0.5312, "0.531"), (1203.4, "1 203"), (-2.5, "−2.50"), (3.2e-5, "3.20·10⁻⁵"),
     (0.0, "0"), (None, "–"), (float("nan"), "–")],
)  # fmt: skip
def test_numbers_as_a_reader_wants_them(value: float | None, shown: str) -> None:
    assert markup.number(value).replace("\u202f", " ") == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.25, "0.25 s"), (25.1, "25 s"), (61, "1 min 1 s"), (7500, "2 h 5 min"), (59.9, "1 min")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert markup.duration(seconds).replace("\u00a0", " ") == shown


def test_text_is_escaped_once_and_markup_is_not() -> None:
    inner = markup.tag("b", "<&>")
    assert markup.tag("p", inner, "'", title='"') == '<p title="&quot;"><b>&lt;&amp;&gt;</b>&#x27;</p>'
