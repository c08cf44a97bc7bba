"""The page on several models: what it says, and that no hole and no foreign text breaks it."""

from __future__ import annotations

import copy
import functools
import html as markup
import re

import pytest

from pellucid.glass import charts
from pellucid.glass.reading import Fields
from pellucid.glass.report import render_comparison
from pellucid.glass.sections.compare import Entry, answer

STEPS = ("compress", "sparsify")


def outcome(seed: int, accuracy: float, white: bool, fell: float) -> dict:
    steps = [
        {"layer": layer, "step": step, "descended": fell if (layer, step) == (2, "sparsify") else 1.0}
        for layer in (1, 2, 3)
        for step in STEPS
    ]
    return {
        "seed": seed,
        "accuracy": accuracy,
        "interval": [accuracy - 0.01, accuracy + 0.01],
        "count": 450,
        "seconds": 61.0,
        "images_per_second": 1320.0,
        "steps": steps if white else [],
        "nonzero": 0.31 if white else None,
        "descending": (5 if fell < 0.99 else 6) if white else 0,
    }


def model(label: str, accuracies: list[float], better: bool | None, *, white: bool, parameters: int) -> dict:
    """``better`` is the verdict on the difference to the first, which itself has none."""
    gap = {
        "mean": -0.0123,
        "interval": [-0.031, 0.0071],
        "better": better,
        "text": f"{label} against crate: -1.23 points (95% interval -3.10 to +0.71 points): as said.",
    }
    mean = sum(accuracies) / len(accuracies)
    return {
        "label": label,
        "name": f"{label}_digits",
        "model_args": {},
        "parameters": parameters,
        "flop": 50 * parameters,
        "outcomes": [outcome(i, a, white, 0.4 + 0.1 * i) for i, a in enumerate(accuracies)],
        "images_per_second": 7560.0,
        "speed": [1.0, 1.0, 1.0] if label == "crate" else [0.62, 0.58, 0.71],
        "difference": None if label == "crate" else gap,
        "accuracy": mean,
        "deviation": 0.0045,
        "descended": 0.9167 if white else None,
        "nonzero": 0.31 if white else None,
    }


@pytest.fixture
def bundle() -> dict:
    return {
        "title": "small ones",
        "created": "2026-11-24",
        "version": "0.1.0",
        "command": "pellucid compare digits --models crate_digits tost_digits vit_digits",
        "comparison": {
            "data": "digits",
            "match": "params",
            "epochs": 60,
            "seeds": [0, 1, 2],
            "models": [
                model("crate", [0.985, 0.991, 0.988], None, white=True, parameters=36_042),
                model("tost", [0.97, 0.975, 0.98], False, white=True, parameters=39_690),
                model("vit", [0.984, 0.98, 0.99], None, white=False, parameters=202_186),
            ],
            "machine": {"cpu": "a processor", "threads": 1},
        },
        "data": {"name": "digits", "train": 1347, "test": 450, "classes": ["0", "1"], "rejects": []},
        "config": {"epochs": 60, "lr": 0.003},
    }


def text_of(page: str) -> str:
    """What a reader sees, with plain spaces."""
    body = re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", markup.unescape(re.sub(r"<[^>]+>", " ", body)))


def test_the_numbers_stand_on_the_page(bundle: dict) -> None:
    page = render_comparison(bundle)
    read = text_of(page)
    assert "crate reaches 98.8 %; of 2 others, 1 does worse and 1 cannot be told from it." in read
    assert "mean of 3 runs, one for each seed, on 450 test images of digits" in read
    assert "same recipe for 60 epochs" in read
    assert "about the same number of parameters" in read
    for shown in (
        "98.80 ± 0.45 %",
        "36 042",
        "1.80",
        "0.62 ×",
        "31 %",
        "1 min 1 s",
        "7 560",
        "0.62 (0.58 to 0.71)",
    ):
        assert shown in read, shown
    assert "−1.23 (−3.10 to +0.71)" in read
    assert "tost against crate: −1.23 points (95% interval −3.10 to +0.71 points): as said." in read
    assert "▲ 5 of 6 steps" in read
    assert "crate: 5, 5 and 5 of 6 steps descend, seed by seed" in read
    assert "Lowest: layer 2 sparsify, 50.0 %." in read
    assert "vit states no objective for any layer" in read
    assert "cpu a processor, threads 1" in read
    assert "pellucid compare digits --models crate_digits tost_digits vit_digits" in read
    assert page.count("<svg") >= 5
    for anchor in ("accuracy", "cost", "audit", "data", "reproduce"):
        assert f'id="{anchor}"' in page


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        ([], "a reaches 90.0 %."),
        ([None], "a reaches 90.0 %; b cannot be told from it."),
        ([True], "a reaches 90.0 %; b does better."),
        ([False], "a reaches 90.0 %; b does worse."),
        ([None, None], "a reaches 90.0 %; none of 2 others can be told from it."),
        ([False, False, True], "a reaches 90.0 %; of 3 others, 1 does better and 2 do worse."),
        ([True, None], "a reaches 90.0 %; of 2 others, 1 does better and 1 cannot be told from it."),
    ],
)
def test_the_answer(verdicts: list[bool | None], said: str) -> None:
    found = [Entry(0, Fields({"label": "a", "accuracy": 0.9}))]
    for i, better in enumerate(verdicts):
        fields = {"label": "bcd"[i], "accuracy": 0.9, "difference": {"better": better}}
        found.append(Entry(i + 1, Fields(fields)))
    assert answer(found).replace("\u00a0", " ") == said


def test_foreign_text_stays_text(bundle: dict) -> None:
    evil = "<script>alert(1)</script>"
    first = bundle["comparison"]["models"][0]
    first["label"] = first["outcomes"][0]["steps"][0]["step"] = evil
    bundle["comparison"]["models"][1]["difference"]["text"] = bundle["comparison"]["data"] = evil
    bundle["title"] = bundle["comparison"]["machine"]["cpu"] = evil
    page = render_comparison(bundle)
    assert evil not in page
    assert page.count("<script>") == 1


def places(value: object, at: tuple = ()) -> list[tuple]:
    """Every place in a nested dict or list; of a list its first two items stand for all."""
    if isinstance(value, dict):
        return [at, *(p for key, inner in value.items() for p in places(inner, (*at, key)))]
    if isinstance(value, list) and value:
        return [at, *(p for i, inner in enumerate(value[:2]) for p in places(inner, (*at, i)))]
    return [at]


def value_at(bundle: dict, at: tuple) -> object:
    return functools.reduce(lambda inner, key: inner[key], at, bundle)


def with_hole(bundle: dict, at: tuple, filling: object) -> dict:
    bundle = copy.deepcopy(bundle)
    value_at(bundle, at[:-1])[at[-1]] = filling
    return bundle


@pytest.mark.parametrize("filling", [None, float("nan"), "?", {}, -1, 1e300], ids=repr)
def test_every_hole_is_survived(bundle: dict, filling: object) -> None:
    holes = [at for at in places(bundle) if at]
    assert len(holes) > 120
    for at in holes:
        page = render_comparison(with_hole(bundle, at, filling))
        assert page.endswith("</html>\n"), at
        # Where a number stood that is drawn; texts and settings are shown as they are.
        if isinstance(value_at(bundle, at), float) and at[0] != "config":
            assert not re.search(r"\b(nan|inf)\b", text_of(page)), at


def test_an_empty_bundle_is_a_page() -> None:
    assert "This comparison holds no model." in text_of(render_comparison({}))


def test_dots_lie_on_a_common_axis() -> None:
    rows = [charts.Dots("a", [0.5, 0.7], "said a", 0), charts.Dots("b", [0.7], "said b")]
    drawn = charts.dot_plot("t", rows, "accuracy")
    circles = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', drawn)]
    squares = [float(x) + 4 for x in re.findall(r'<rect x="([\d.]+)"', drawn)]
    assert len(circles) == 2
    assert squares == pytest.approx([max(circles)])
    mean = re.search(r'x1="([\d.]+)" y1="[\d.]+" x2="\1" y2="[\d.]+" class="bar s0"', drawn)
    assert mean
    assert float(mean[1]) == pytest.approx(sum(circles) / 2, abs=0.02)
    assert "said a" in drawn
    assert charts.dot_plot("t", [charts.Dots("a", [], "")], "accuracy") == ""


def boxes(drawn: str, names: list[str]) -> list[tuple[float, float, float, float]]:
    found = []
    for name in names:
        at = re.search(rf'<text x="([\d.]+)" y="([\d.]+)">{name}</text>', drawn)
        assert at, name
        x, y = float(at[1]), float(at[2])
        found.append((x, y - 10, x + 6.2 * len(name), y + 2))
    return found


def test_names_of_near_points_do_not_cover_each_other() -> None:
    names = [f"model {i}" for i in range(5)]
    spots = [charts.Spot(n, 1000 + i, 0.9 + 0.001 * i, 0.89, 0.91) for i, n in enumerate(names)]
    found = boxes(
        charts.scatter("t", [*spots, charts.Spot("far", 9000, 0.5, 0.5, 0.5)], "size"), [*names, "far"]
    )
    for i, a in enumerate(found):
        assert a[0] >= 0
        assert a[2] <= charts.WIDTH
        for b in found[:i]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


def test_a_scatter_of_one_point_has_an_axis() -> None:
    drawn = charts.scatter("t", [charts.Spot("a", 36.0, 0.9, 0.9, 0.9)], "thousands")
    assert "thousands" in drawn
    assert "nan" not in drawn
    assert charts.scatter("t", [], "thousands") == ""
