"""The report on text, from made-up bundles: what it says, and whole whatever is missing."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from html import unescape
from html.parser import HTMLParser

import pytest

from pellucid.glass.report import render
from pellucid.glass.sections.passage import LEVELS, Word, level_of, one_line, passage, quoted, visible

MakeBundle = Callable[..., dict]
HOSTILE = '<evil onload="x()">&\'"</title></style></script></svg><script>evil()</script>'
SECTIONS = [
    "words", "writing", "context", "model", "audit", "atoms", "attention", "tokens", "learning", "data",
    "reproduce",
]  # fmt: skip


def text_of(html: str) -> str:
    words = re.sub(r"<(style|script)>.*?</\1>|<[^>]*>", " ", html, flags=re.DOTALL)
    words = " ".join(unescape(words).replace("\u202f", " ").replace("\u00a0", " ").split())
    return words.replace(" ,", ",").replace(" .", ".")


def names_of(html: str) -> set[str]:
    """Every element, and every attribute with ``=`` behind it."""

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list) -> None:
            found.update({tag, *(name if name.startswith("on") else f"{name}=" for name, _ in attrs)})

    found: set[str] = set()
    Reader().feed(html)
    return found


def sections(html: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', html)


def small(make_bundle: MakeBundle, task: str = "next", **options: object) -> dict:
    chosen: dict = {"depth": 1, "heads": 1, "models": 2, "names": ["law", "gospel"], "rising": ()}
    return make_bundle(**{**chosen, "task": task, **options})


def test_says_what_was_measured(make_bundle: MakeBundle) -> None:
    bundle = small(make_bundle, depth=3, heads=2)
    for row in bundle["models"][0]["audit"]["rows"]:
        row["descended"] = 1.0
    html = render(bundle)
    text = text_of(html)
    assert "CRATE needs 2.16 bits for each byte of unseen text, and every layer does its step." in text
    assert "it is between 2.06 and 2.26, by how much 12 documents differ." in text
    assert (
        "That is 1.50 nats for each word, a perplexity of 4.48: it is as unsure as among so many words."
        in text
    )
    assert "By how common each word is alone, it would need 4.20 bits." in text
    assert (
        "ViT, beside it, needs 2.31 bits, 0.100 more (0.0500 to 0.150, document by document), which is no"
        in text
    )
    assert "on at least 99 % of the texts" in text
    assert "training texts by heart" in text
    assert "books: 60 documents for training (80.0 kB) and 12 documents for test (20.0 kB)." in text
    assert "the tokenizer bpe, which knows 1 024 words and makes one of 4.00 bytes" in text
    assert "Its fingerprint begins with abababababab." in text
    assert sections(html) == SECTIONS
    assert "image" not in text


def test_a_difference_that_may_be_chance_is_called_so(make_bundle: MakeBundle) -> None:
    bundle = small(make_bundle)
    bundle["models"][1]["text"]["against"] = {"more": -0.01, "interval": [-0.05, 0.03]}
    text = text_of(render(bundle))
    assert (
        "needs 2.31 bits, 0.0100 fewer (−0.0500 to 0.0300, document by document), which could be chance."
        in text
    )
    bundle["models"][1]["text"]["against"] = {"more": -0.2, "interval": [-0.3, -0.1]}
    assert "0.200 fewer (0.100 to 0.300, document by document), which is no chance." in text_of(
        render(bundle)
    )
    bundle["models"][1]["text"]["against"] = None
    assert "beside it" not in text_of(render(bundle))


def test_every_word_says_its_bits_and_the_worst_are_listed(make_bundle: MakeBundle) -> None:
    bundle = small(make_bundle, models=1)
    words = bundle["models"][0]["text"]["samples"][0]["words"]
    words[7] = {
        "text": "wilderness",
        "special": False,
        "bits": 9.5,
        "likeliest": [["earth", 0.41], ["<b>", 0.1]],
    }
    html = render(bundle)
    titles = [unescape(title) for title in re.findall(r'<span class="q\d+" title="([^"]*)"', html)]
    assert "9.50 bits; likeliest: ‘earth’ 41\u00a0%, ‘<b>’ 10\u00a0%" in titles
    strong = re.search(r'<span class="q(\d+)" title="9\.50[^>]*>wilderness</span>', html)
    assert strong is not None
    assert int(strong[1]) == round(8 * 9.5 / math.log2(1024))
    table = html[html.index("The most surprising words of this text") :]
    assert "‘wilderness’" in table[: table.index("</tr><tr>", 900)]
    # A text's words stand in it whole and in their order.
    shown = re.search(r'<p class="passage">(.*?)</p>', html, re.DOTALL)
    said = "".join(word["text"] for word in words).replace("\n", "↵\n")
    assert unescape(re.sub("<[^>]*>", "", shown[1])) == said  # type: ignore[index]


def test_lines_of_heads_say_where_they_look(make_bundle: MakeBundle) -> None:
    bundle = small(make_bundle, models=1)
    gaze = bundle["models"][0]["text"]["attention"][0]
    gaze["layers"][0]["heads"][0] = [0.0, 0.75, 0.25] + [0.0] * 9
    text = text_of(render(bundle))
    assert "head 1 most on ‘the ’ 75 % and ‘beginning ’ 25 %" in text
    assert "from ‘the ’ to tell ‘the’" in text
    gaze["kind"] = "membership"
    assert "what share of each word belongs to the group of that head" in text_of(render(bundle))


def test_atoms_stand_beside_hidden_units(make_bundle: MakeBundle) -> None:
    html = render(small(make_bundle, depth=2))
    text = text_of(html)
    assert "CRATE: 0.600 in the mean of its layers. ViT: 0.600 in the mean of its layers." in text
    assert "512 atoms" in text
    assert "512 units" in text
    assert "atom 0 score 0.90 fires at 2.0 %" in text
    assert "unit 201" in text
    assert "70 % of its strongest contexts stand at ‘the’, which is 6.0 % of all words." in text
    assert re.search(r'<span class="a8 reader" title="response 3\.00">beginning</span>', html)


@pytest.mark.parametrize(
    ("task", "start"),
    [("masked", "CRATE fills in 55.0 % of the hidden words of unseen"), ("whole", "CRATE recognises")],
)
def test_other_tasks(make_bundle: MakeBundle, task: str, start: str) -> None:
    html = render(small(make_bundle, task, models=1))
    assert text_of(html[html.index("<h1>") :]).startswith(start)
    assert "writing" not in sections(html)
    assert ("accuracy" in sections(html)) == (task == "whole")
    if task == "masked":
        assert "it is between 50.0 and 60.0 %, by how much 12 documents differ" in text_of(html)
        assert "nats per word" in text_of(html)
    else:
        assert "▲ taken for gospel" in text_of(html) or "taken for gospel" in text_of(html)


def test_every_section_opens_with_what_to_look_for(make_bundle: MakeBundle) -> None:
    html = render(small(make_bundle))
    assert html.count('<div class="opening"><h2>') == html.count("<section ")
    assert html.count('<p class="lead">') == html.count("<section ") + 1


def test_asks_no_host_and_no_attribute_is_a_script(make_bundle: MakeBundle) -> None:
    html = render(small(make_bundle))
    assert not re.search(r"https?://|@import|url\(", html)
    assert not {name for name in names_of(html) if name.startswith("on") or name == "style="}
    assert html.count("'sha256-") + html.count("&#x27;sha256-") == 2


@pytest.mark.parametrize("task", ["next", "masked", "whole"])
def test_hostile_strings_stay_text(make_bundle: MakeBundle, task: str) -> None:
    def poison(value: object, key: object = "") -> object:
        if isinstance(value, dict):
            return {k: poison(inner, k) for k, inner in value.items()} | {HOSTILE: HOSTILE}
        if isinstance(value, list):
            return [poison(inner, key) for inner in value]
        keep = key in ("task", "kind", "unit") and value in ("next", "masked", "whole", "text", "attention")
        return HOSTILE + value[:3] if isinstance(value, str) and not keep else value

    html = render(poison(small(make_bundle, task, models=2)))  # type: ignore[arg-type]
    assert "<evil" not in html
    assert html.count("<script") == 1
    assert not names_of(html) & {"evil", "onload"}
    assert "<script>evil()</script>" in text_of(html)


def paths(value: object, start: tuple = ()) -> Iterator[tuple]:
    """Every key of a nested dict; of a list only the first element, the others being alike."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*start, key)
            yield from paths(inner, (*start, key))
    elif isinstance(value, list) and value:
        yield (*start, 0)
        yield from paths(value[0], (*start, 0))


def changed(bundle: dict, path: tuple, value: object) -> dict:
    bundle = copy.deepcopy(bundle)
    inner = bundle
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return bundle


def whole(html: str) -> None:
    """Every element is closed, and no number is shown as none."""
    opened: list[str] = []
    for closing, name in re.findall(r"<(/?)(\w+)[^>]*>", html.split("</style>")[1].split("<script>")[0]):
        if name in ("meta", "img", "br"):
            continue
        if closing:
            assert opened.pop() == name if opened else name == "head"
        else:
            opened.append(name)
    html.encode("utf-8")


STRANGE = [math.inf, -1.0, 0, 1e308, True, "", [], {}, [None], [[]]]


@pytest.mark.parametrize(
    "value",
    [..., None, *(pytest.param(v, marks=pytest.mark.slow) for v in (math.nan, "x", *STRANGE))],
    ids=lambda value: repr(value)[:12],
)
def test_tolerates_anything_anywhere_in_what_is_of_text(make_bundle: MakeBundle, value: object) -> None:
    bundle = small(make_bundle, models=1)
    for path in paths(bundle):
        if path[:3] == ("models", 0, "text") or path[0] == "data":
            whole(render(changed(bundle, path, value)))


def test_a_large_bundle_stays_below_its_size(make_bundle: MakeBundle) -> None:
    html = render(make_bundle(depth=12, heads=12, models=2, task="next", rising=()))
    assert len(html.encode()) < 1_500_000
    assert "left out to keep this file small" in html


def test_neighbours_of_which_the_same_is_said_are_one_stretch() -> None:
    words = [Word("a", 2), Word("b", 2), Word("c"), Word("<d>"), Word("e\n", 3, "said")]
    assert passage(words, "q") == (
        '<p class="passage"><span class="q2">ab</span>c&lt;d&gt;<span class="q3" title="said">e↵\n</span></p>'
    )


def test_line_ends_are_signs() -> None:
    assert visible("a\r\nb\n↵c\rd") == "a↵\nb↵\n↵c↵\nd"
    assert visible(one_line("a\nb")) == one_line("a\nb") == "a↵b"
    assert quoted(" \n") == "‘ ↵’"


def test_levels() -> None:
    assert [level_of(v, 8.0) for v in (-1.0, 0.0, 0.4, 1.0, 8.0, 99.0)] == [0, 0, 0, 1, LEVELS, LEVELS]
    assert level_of(1.0, 0.0) == 0
