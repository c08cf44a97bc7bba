"""The report on a run without labels, from made-up bundles: what it says, and whole whatever is missing."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator

import pytest

from pellucid.glass.report import render

MakeBundle = Callable[..., dict]
HOSTILE = '<evil onload="x()">&\'"</title></style></script></svg><script>evil()</script>'
SECTIONS = [
    "views", "learning", "neighbours", "map", "accuracy",
    "model", "audit", "tokens", "attention", "data", "reproduce",
]  # fmt: skip
OWN = ("learnt", "health", "curves", "scores", "features", "views")


def text_of(html: str) -> str:
    words = re.sub(r"<(style|script)>.*?</\1>|<[^>]*>", " ", html, flags=re.DOTALL)
    words = " ".join(words.replace("\u202f", " ").replace("\u00a0", " ").split())
    return words.replace(" ,", ",").replace(" .", ".")


def sections(html: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', html)


def headline(html: str) -> str:
    return text_of(re.search(r"<h1>.*?</h1>", html, re.DOTALL)[0])  # type: ignore[index]


def small(make_bundle: MakeBundle, **options: object) -> dict:
    chosen: dict = {"depth": 1, "heads": 1, "images": 1, "grid": 2, "models": 1, "names": ["a", "b", "c"]}
    return make_bundle(**{**chosen, "rising": (), "unlabelled": "simdino", **options})


def test_says_what_was_learnt_from_and_what_it_is_worth(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(unlabelled="simdino", rising=())
    bundle["models"][0]["scores"].update(accuracy=0.9, interval=[0.85, 0.95], count=450)
    html = render(bundle)
    text = text_of(html)
    start = "CRATE, trained without labels, recognises 90.0 % of 450 test images by their nearest neighbours"
    assert headline(html).startswith(start)
    assert "It learnt from 1 347 images without labels, by SimDINO: views of one image must agree" in text
    assert "The 20 nearest of 1 347 training images vote for a class. Untrained it reached 70.0 %." in text
    assert "With 95 % confidence its accuracy lies between 85.0 and 95.0 %." in text
    assert "● Healthy: effective rank 35.0 of 64." in text
    assert "35.0 of 64 ● healthy" in text  # in the table
    assert "distortion of the coding rate" in text
    assert sections(html) == SECTIONS


def test_without_any_label_the_directions_stand_in_its_place(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(unlabelled="mae", names=[], rising=(), models=1)
    html = render(bundle)
    assert headline(html).startswith(
        "CRATE, trained without labels, tells images apart in 35.0 of 64 directions"
    )
    text = text_of(html)
    assert "by masked autoencoding: the pixels of hidden patches" in text
    assert "50 % of the patches are hidden." in text
    assert "in sight filled in" in text
    assert "No accuracy" not in text
    assert "predicted" not in text
    assert "nearest neighbours" not in headline(html)
    assert sections(html) == [name for name in SECTIONS if name != "accuracy"]
    assert "Test images" in html or "test images" in html


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("collapsed", "CRATE has collapsed: its features are all but the same for every image."),
        ("collapsing", "CRATE is collapsing: its features tell images apart less and less."),
        ("idle", "CRATE has learnt nothing: views of one image are no closer to each other than different"),
    ],
)
def test_a_run_that_is_not_well_says_so_first(make_bundle: MakeBundle, state: str, said: str) -> None:
    html = render(make_bundle(unlabelled="dino", state=state, models=1))
    word = {"idle": "nothing learnt"}.get(state, state)
    assert headline(html).startswith(said)
    assert f"○ untrained, epoch 0 ● healthy, epochs 1 to 9 ▲ {word}, epochs 10 to 20" in text_of(html)
    assert '<p class="verdict warn">▲' in html
    charts = re.findall(r"<svg[^>]*over the epochs.*?</svg>", html, re.DOTALL)
    assert len(charts) == 7
    assert all(chart.count('class="band"') == 11 for chart in charts)
    assert "Shaded: epochs in which CRATE was not well." in text_of(html)


def test_a_healthy_run_is_not_shaded(make_bundle: MakeBundle) -> None:
    html = render(make_bundle(unlabelled="simdino", models=1))
    assert 'class="band"' not in html
    assert "Shaded" not in text_of(html)


def test_every_curve_is_there_as_numbers_too(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(unlabelled="simdino", models=1)
    html = render(bundle)
    table = re.search(r"<table[^>]*><caption>Evaluations of CRATE.*?</table>", html, re.DOTALL)
    assert table
    heads = re.findall(r"<th[^>]*scope=\"col\"[^>]*>(.*?)</th>", table[0])
    assert heads == [
        "epoch", "state", "loss", "alignment", "rate share",
        "effective rank", "view cosine", "cosine", "norm spread", "knn accuracy",
    ]  # fmt: skip
    rows = [text_of(row).split() for row in re.findall(r"<tr>.*?</tr>", table[0])[1:]]
    assert len(rows) == 21
    assert rows[0][:5] == ["0", "○", "untrained", "–", "–"]  # nothing was logged before the first step
    assert rows[20][:6] == ["20.0", "●", "healthy", "−1.67", "0.900", "80.0"]


def test_neighbours_of_another_class_are_marked(make_bundle: MakeBundle) -> None:
    html = render(make_bundle(unlabelled="simdino", models=1))
    part = html[html.index('<section id="neighbours"') : html.index('<section id="map"')]
    assert part.count('<figure class="shot') == 2 * (1 + 3)
    assert "Of the 6 shown, 2 are of the image’s own class." in text_of(part)
    assert part.count("▲") == 4
    assert "0.990" in text_of(part)


def test_the_map_tells_classes_apart_without_colour(make_bundle: MakeBundle) -> None:
    names = [f"class {i}" for i in range(12)]
    html = render(make_bundle(unlabelled="simdino", models=1, names=names))
    part = html[html.index('<section id="map"') : html.index('<section id="accuracy"')]
    clouds = re.findall(r"<g><title>([^<]*)</title>(.*?)</g>", part)
    assert [name for name, _ in clouds] == ["other classes", *sorted(names)[:10]]
    kinds = {(re.match(r"<(\w+)", marks)[1], re.search(r"k\d", marks)[0]) for _, marks in clouds[1:]}  # type: ignore[index]
    assert len(kinds) == 10
    assert all(
        part.count(f">{name}</text>") == 1 for name in sorted(names)[:10]
    )  # in the middle of its class
    assert part.count("<image ") == 12


def test_one_that_stands_beside_with_a_classifier_is_told_apart(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(unlabelled="simdino", models=2)
    bundle["models"][1] = make_bundle(models=2)["models"][1]
    text = text_of(render(bundle))
    assert "ViT, beside it, reaches" in text
    assert "by its classifier" in text
    bundle["models"].reverse()
    text = text_of(render(bundle))
    assert "by nearest neighbours" in text
    assert sections(render(bundle))[0] == "model"


def paths(value: object, start: tuple = ()) -> Iterator[tuple]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*start, key)
            yield from paths(inner, (*start, key))
    elif isinstance(value, list) and value:
        yield (*start, 0)
        yield from paths(value[0], (*start, 0))


@pytest.mark.parametrize("value", [None, math.nan, "x", -1.0, [[None]]], ids=repr)
@pytest.mark.parametrize("objective", ["simdino", "mae"])
def test_tolerates_anything_in_the_new_fields(make_bundle: MakeBundle, objective: str, value: object) -> None:
    bundle = small(make_bundle, unlabelled=objective)
    chosen = [path for path in paths(bundle) if path[0] == "models" and len(path) > 2 and path[2] in OWN]
    assert len(chosen) > 50
    for path in chosen:
        changed = copy.deepcopy(bundle)
        inner: object = changed
        for key in path[:-1]:
            inner = inner[key]  # type: ignore[index]
        was = inner[path[-1]]  # type: ignore[index]
        inner[path[-1]] = value  # type: ignore[index]
        html = render(changed)
        assert html.count("<h1>") == 1
        assert not isinstance(was, int | float) or "nan" not in text_of(html).lower().split()


def test_hostile_strings_stay_text(make_bundle: MakeBundle) -> None:
    def poison(value: object) -> object:
        if isinstance(value, dict):
            return {key: poison(inner) for key, inner in value.items()} | {HOSTILE: HOSTILE}
        if isinstance(value, list):
            return [poison(inner) for inner in value]
        keep = isinstance(value, str) and (value.startswith("data:") or value in ("crops", "healthy"))
        return HOSTILE + value[:3] if isinstance(value, str) and not keep else value

    bundle = small(make_bundle)
    bundle["models"] = poison(bundle["models"])
    html = render(bundle)
    assert html.count("<script>") == 1
    assert "<evil" not in html
    assert "&lt;evil" in html


@pytest.mark.parametrize("png", ["https://host/x.png", "data:image/svg+xml;base64,AAAA", 3, "data:,x"])
def test_pictures_that_are_none_are_left_out(make_bundle: MakeBundle, png: object) -> None:
    bundle = small(make_bundle)
    html = render(bundle)
    shots = html.count('<figure class="shot')
    bundle["models"][0]["views"]["images"][0]["large"][0] = png
    bundle["models"][0]["features"]["neighbours"][0]["near"][0]["png"] = png
    bundle["models"][0]["features"]["map"]["pictures"][0]["png"] = png
    fewer = render(bundle)
    assert fewer.count('<figure class="shot') == shots - 2
    assert fewer.count("<image ") == html.count("<image ") - 1
