"""The report: self-contained, escaped, well-formed, and whole whatever the bundle lacks."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser

import pytest

from pellucid.glass.report import render

VOID = {"meta", "img", "br", "input", "link", "hr"}
HOSTILE = '<evil onload="x()">&\'"</title></style></script></svg><script>evil()</script>'
MakeBundle = Callable[..., dict]
Path = tuple[str | int, ...]


class Reader(HTMLParser):
    """Collects elements and visible text, and fails on tags that do not match."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    html.encode("utf-8")
    return reader


def paths(value: object, start: Path = ()) -> Iterator[Path]:
    """Every key of a nested dict; of a list only the first element, the others being alike."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*start, key)
            yield from paths(inner, (*start, key))
    elif isinstance(value, list) and value:
        yield (*start, 0)
        yield from paths(value[0], (*start, 0))


def changed(bundle: dict, path: Path, value: object) -> dict:
    """A copy in which ``path`` holds ``value``, or nothing at all for ``Ellipsis``."""
    bundle = copy.deepcopy(bundle)
    inner: object = bundle
    for key in path[:-1]:
        inner = inner[key]  # type: ignore[index]
    if value is ...:
        del inner[path[-1]]  # type: ignore[attr-defined]
    else:
        inner[path[-1]] = value  # type: ignore[index]
    return bundle


def small(make_bundle: MakeBundle) -> dict:
    return make_bundle(depth=2, heads=2, names=["a", "b", "c"], images=2, grid=2)


def test_says_what_was_measured(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    bundle["models"][0]["scores"].update(accuracy=0.9822, interval=[0.966, 0.991], count=450)
    for row in bundle["models"][0]["audit"]["rows"][1:]:
        row["descended"] = 1.0
    text = read(render(bundle)).text.replace("\u202f", " ").replace("\u00a0", " ")
    assert "CRATE recognises 98.2 % of 450 test images, but not every layer does its step." in text
    assert "With 95 % confidence its accuracy lies between 96.6 and 99.1 %." in text
    assert "It has 53 000 parameters and trained in 25 s." in text
    assert "7 of 8 measured steps lower their objective" in text
    assert "1 raises it (layer 1 compress)" in text
    assert "▲ rises" in text


def test_sections_come_in_order(make_bundle: MakeBundle) -> None:
    found = [a["id"] for tag, a in read(render(make_bundle())).elements if tag == "section"]
    assert found == ["model", "audit", "tokens", "attention", "learning", "accuracy", "data", "reproduce"]


def test_every_section_opens_with_what_to_look_for(make_bundle: MakeBundle) -> None:
    html = render(make_bundle())
    assert html.count('<div class="opening"><h2>') == html.count("<section ")
    assert html.count('<p class="lead">') == html.count("<section ") + 1


def test_asks_no_host_for_anything(make_bundle: MakeBundle) -> None:
    html = render(make_bundle())
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", html)
    for tag, attributes in read(html).elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/")), (tag, attributes)
        assert not any(name.startswith("on") or name == "style" for name in attributes)


def test_policy_names_the_only_script_and_style(make_bundle: MakeBundle) -> None:
    reader = read(render(make_bundle()))
    policy = next(a["content"] or "" for _, a in reader.elements if a.get("http-equiv"))
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2
    assert (reader.count("script"), reader.count("style")) == (1, 1)


def test_hostile_strings_stay_text(make_bundle: MakeBundle) -> None:
    def poison(value: object) -> object:
        if isinstance(value, dict):
            # The names of steps and settings are strings of the user's as well.
            return {key: poison(inner) for key, inner in value.items()} | {HOSTILE: HOSTILE}
        if isinstance(value, list):
            return [poison(inner) for inner in value]
        return HOSTILE + value[:3] if isinstance(value, str) and not value.startswith("data:") else value

    reader = read(render(poison(small(make_bundle))))  # type: ignore[arg-type]
    assert reader.count("script") == 1
    assert reader.count("evil") == 0
    assert not any("onload" in attributes for _, attributes in reader.elements)
    assert "<script>evil()</script>" in reader.text


@pytest.mark.parametrize(
    "png", ["https://host/x.png", "data:image/svg+xml;base64,AAAA", 'data:image/png;base64,"', 3]
)
def test_pictures_that_are_none_are_left_out(make_bundle: MakeBundle, png: object) -> None:
    bundle = small(make_bundle)
    for model in bundle["models"]:
        for image in model["attention"]["images"]:
            image["png"] = png
    reader = read(render(bundle))
    assert reader.count("image") == 0
    assert reader.count("img") > 0


def test_unprintable_file_names_are_shown_safely(make_bundle: MakeBundle) -> None:
    bundle = small(make_bundle)
    bundle["data"]["rejects"] = [{"path": "a\udcff\x00\u202egnp.exe", "reason": "\x1b[31m"}]
    text = read(render(bundle)).text
    assert "a\ufffd\ufffd\ufffdgnp.exe" in text


# The keys of one small bundle, as the test of each missing one is named after them.
KEYS = sorted(
    {
        "title", "created", "version", "command", "models", "data", "config",
        "name", "label", "parameters", "seconds", "facts", "curves", "scores", "audit", "attention",
    }
)  # fmt: skip


@pytest.mark.parametrize("value", [..., None], ids=["missing", "None"])
@pytest.mark.parametrize("key", KEYS)
def test_tolerates_each_field_missing(make_bundle: MakeBundle, key: str, value: object) -> None:
    bundle = small(make_bundle)
    targets = [path for path in paths(bundle) if path[-1] == key and len(path) <= 3]
    assert targets
    for path in targets:
        read(render(changed(bundle, path, value)))


STRANGE = [math.inf, -1.0, 0, 1e308, -1e300, 5e-324, 10**400, True, "", [], {}, [None], [[]]]


@pytest.mark.parametrize(
    "value",
    [..., math.nan, *(pytest.param(value, marks=pytest.mark.slow) for value in (None, "x", *STRANGE))],
    ids=lambda value: repr(value)[:12],
)
def test_tolerates_anything_anywhere(make_bundle: MakeBundle, value: object) -> None:
    bundle = small(make_bundle)
    for path in paths(bundle):
        read(render(changed(bundle, path, value)))


def test_tolerates_no_number_at_all(make_bundle: MakeBundle) -> None:
    bundle = changed(small(make_bundle), ("config",), ...)
    for nothing in ("null", "NaN"):
        text = re.sub(r"(?<=[\[ ])-?\d+(\.\d+)?(e-?\d+)?(?=[,\]}])", nothing, json.dumps(bundle))
        assert "nan" not in read(render(json.loads(text))).text.lower().split()


@pytest.mark.parametrize(
    "bundle", [{}, {"models": []}, {"models": [{}]}, {"models": None, "title": "t"}], ids=str
)
def test_renders_nothing_worth_mentioning(bundle: dict) -> None:
    assert read(render(bundle)).count("h1") == 1


@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize("depth", [1, 12])
def test_any_number_of_models_and_layers(make_bundle: MakeBundle, models: int, depth: int) -> None:
    bundle = make_bundle(models=models, depth=depth, rising=())
    reader = read(render(bundle))
    assert ("ViT" in reader.text) == (models > 1)
    assert "every layer does its step" in reader.text
    assert "▲" not in reader.text.replace("▲ higher", "").replace("▲ taken", "")


def test_intervals_that_overlap_settle_nothing(make_bundle: MakeBundle) -> None:
    bundle = small(make_bundle)
    mine, theirs = (model["scores"] for model in bundle["models"])
    mine["interval"], theirs["interval"] = [0.9, 0.95], [0.94, 0.99]
    assert "do not settle which is better" in read(render(bundle)).text
    theirs["interval"] = [0.96, 0.99]
    assert "the intervals do not overlap" in read(render(bundle)).text


def test_a_fall_on_most_but_not_enough_images_is_told_apart(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(models=1, rising=())
    for row in bundle["models"][0]["audit"]["rows"]:
        row["descended"] = 1.0
    bundle["models"][0]["audit"]["rows"][3]["descended"] = 0.9899
    text = read(render(bundle)).text.replace("\u00a0", " ")
    assert "1 on fewer (layer 2 sparsify)" in text
    assert "○ mostly falls" in text


def test_a_step_past_its_bound_is_named(make_bundle: MakeBundle) -> None:
    text = read(render(make_bundle(rising=((2, "sparsify"),)))).text
    assert "Longer than the bound up to which descent is guaranteed: the step of layer 2 sparsify." in text


def test_a_thousand_classes_stay_small(make_bundle: MakeBundle) -> None:
    names = [f"n{i:08d}" for i in range(1000)]
    html = render(make_bundle(names=names, models=1, images=1, per_class=5))
    assert len(html.encode()) < 300_000
    text = read(html).text.replace("\u202f", " ")
    assert "The 15 worst of 1 000 classes" in text
    assert "The strongest confusions" in text


def test_a_large_bundle_stays_below_its_size(make_bundle: MakeBundle) -> None:
    html = render(make_bundle(depth=12, heads=12, grid=14, side=64, images=8))
    assert len(html.encode()) < 1_500_000
    assert "left out to keep this file small" in html


def test_every_picture_has_a_name(make_bundle: MakeBundle) -> None:
    for tag, attributes in read(render(make_bundle())).elements:
        if tag == "svg":
            assert attributes.get("aria-hidden") or (attributes["role"] == "img" and attributes["aria-label"])
        if tag == "img":
            assert attributes["alt"]


def test_pictures_are_stored_once(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(images=3)
    for model in bundle["models"]:
        model["attention"] = bundle["models"][0]["attention"]
    png = bundle["models"][0]["attention"]["images"][0]["png"]
    assert render(bundle).count(png) == 1
