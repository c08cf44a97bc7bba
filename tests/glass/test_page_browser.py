"""The page in a real browser: from the server, from a file, by mouse and by keyboard alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pellucid.data import load_data
from pellucid.glass.answers import Answers, Subject, bundle, sample_inputs
from pellucid.glass.guard import Guard
from pellucid.glass.opening import open_target
from pellucid.glass.report import render
from pellucid.glass.shelf import Shelf
from pellucid.models import create_model

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
]

VIEWS = ["overview", "layer", "head", "token", "data", "runs"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name, last in (("one", 0.5), ("two", 0.25)):
        (root / name).mkdir()
        (root / name / "config.yaml").write_text(f"model: crate_digits\nepochs: 3\nlr: {last}\n")
        lines = [
            {"step": s, "epoch": s, "split": k, "loss": last * s}
            for s in (1, 2, 3)
            for k in ("train", "test")
        ]
        (root / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def answers(runs: Path) -> Answers:
    torch.manual_seed(0)
    digits = load_data("digits")
    names = ("crate_digits", "vit_digits", "tost_digits")
    subjects = [Subject(create_model(name).eval(), name, digits) for name in names]
    inputs = sample_inputs(digits, 3)
    return Answers("t", subjects, inputs, shelf=Shelf(runs), takes_inputs=True, audit_limit=16)


Serving = Callable[[Answers], AbstractContextManager[Guard]]


@pytest.fixture(scope="module")
def address(answers: Answers, serving: Serving) -> Iterator[str]:
    with serving(answers) as guard:
        yield guard.address


@pytest.fixture(scope="module")
def report(
    answers: Answers, tmp_path_factory: pytest.TempPathFactory, make_bundle: Callable[..., dict]
) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(make_bundle(), bundle(answers, half=True)), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


class Watched:
    """A page, and whatever it should not have done."""

    def __init__(self, browser: Any, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.page.on(
            "console", lambda m: self.faults.append(m.text) if m.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        # What an answer holds is taken from what the page draws: text on a canvas, as it is written.
        self.page.add_init_script(RECORD)

    def open(self, where: str) -> Any:
        self.page.goto(where)
        self.page.wait_for_selector(".glass nav button")
        return self.page


RECORD = """
window.written = new Map();
const fill = CanvasRenderingContext2D.prototype.fillText;
CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
  if (!written.has(this.canvas)) written.set(this.canvas, []);
  written.get(this.canvas).push(text);
  return fill.call(this, text, x, y);
};
const draw = CanvasRenderingContext2D.prototype.drawImage;
CanvasRenderingContext2D.prototype.drawImage = function (...all) {
  written.set(this.canvas, []);
  return draw.apply(this, all);
};
"""


@pytest.fixture
def watched(browser: Any) -> Iterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def make(**options: Any) -> Watched:
        made.append(Watched(browser, **options))
        return made[-1]

    yield make
    for each in made:
        each.context.close()


@pytest.fixture(params=["server", "file"])
def place(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue({"server": "address", "file": "report"}[request.param])


def go(page: Any, hash_: str) -> None:
    page.evaluate("hash => { location.hash = hash }", hash_)


def foreign(watched: Watched, place: str) -> list[str]:
    own = place.split("/?")[0]
    return [url for url in watched.requests if not url.startswith((own, "data:", "blob:"))]


def views_are_silent_and_fit(page: Any, models: int) -> None:
    for model in range(models):
        for view in VIEWS:
            go(page, f"#/{view}?m={model}&l=2&h=2")
            page.wait_for_selector(f"nav button[aria-current=page]:text-is('{view.capitalize()}')")
            page.wait_for_function("() => !document.querySelector('.glass main [aria-live=polite].quiet')")
            page.wait_for_selector(".glass main h2")
            wide, shown = page.evaluate(
                "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            )
            assert wide <= shown, (view, model)
            assert page.locator(".glass [role=alert]").count() == 0, page.locator(
                ".glass [role=alert]"
            ).all_inner_texts()
            for canvas in page.locator(".glass canvas[role=img]").all():
                assert canvas.get_attribute("aria-label"), view


@pytest.mark.parametrize("width", [1280, 768, 390])
def test_every_view_is_silent_and_fits(watched: Callable[..., Watched], place: str, width: int) -> None:
    seen = watched(width=width, scheme="dark" if width == 768 else "light")
    page = seen.open(place)
    views_are_silent_and_fit(page, 3)
    assert seen.faults == []
    assert foreign(seen, place) == []


def weights_by_hand(answers: Answers, number: int, layer: int, head: int) -> np.ndarray:
    """softmax(w w^T / sqrt p) of one head, from the model's weights and the tokens, in NumPy."""
    model = answers.subjects[0].model
    records: list[Any] = []
    with torch.no_grad():
        model.forward_features(answers.subjects[0].tensor(answers.inputs[number]), on_step=records.append)
    record = records[2 * (layer - 1)]
    z = record.step.norm(record.z)[0].detach().double().numpy()
    basis = record.step.U[head - 1].detach().double().numpy()
    w = z @ basis
    logits = w @ w.T / np.sqrt(w.shape[1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def shown_percent(share: float) -> str:
    value = 100 * share
    return f"{value:.{0 if value >= 10 else 1}f}\u202f%"


def test_clicking_a_patch_draws_the_row_that_numpy_computes(
    watched: Callable[..., Watched], place: str, answers: Answers
) -> None:
    page = watched().open(place)
    go(page, "#/head?i=1&l=3&h=4")
    page.wait_for_selector("h2:text-is('Subspace 4 of 8, layer 3')")
    expected = weights_by_hand(answers, 1, 3, 4)
    picture = page.locator(".glass main .patches canvas").first
    picture.wait_for()
    for patch in (0, 6, 13):
        box = picture.bounding_box()
        x, y = (patch % 4 + 0.5) * box["width"] / 4, (patch // 4 + 0.5) * box["height"] / 4
        picture.click(position={"x": x, "y": y})
        page.wait_for_function(
            "t => new URLSearchParams(location.hash.split('?')[1]).get('t') === t", arg=str(patch + 1)
        )
        page.wait_for_timeout(100)
        written = page.evaluate("written.get(document.querySelector('.glass main .patches canvas'))")
        row = expected[patch + 1]
        assert len(written) == 16
        for text, share in zip(written, row[1:], strict=True):
            near = {shown_percent(share * (1 + e)) for e in (-2e-3, 0, 2e-3)}  # a report's floats are halves
            assert text in near, (patch, text, share)
        said = page.locator(".glass main .said").inner_text()
        assert any(shown_percent(row.max() * (1 + e)) in said for e in (-2e-3, 0, 2e-3))


def test_what_is_chosen_is_in_the_address(watched: Callable[..., Watched], place: str) -> None:
    page = watched().open(place)
    go(page, "#/head?m=1&i=2&l=4&h=3&t=9")
    page.wait_for_selector("h2:text-is('Head 3 of 4, layer 4')")
    page.get_by_role("button", name="previous layer").click()
    page.wait_for_selector("h2:text-is('Head 3 of 4, layer 3')")
    shared = page.evaluate("location.hash")
    other = watched().open(place.split("?")[0] + ("?" + place.split("?")[1] if "?" in place else "") + shared)
    other.wait_for_selector("h2:text-is('Head 3 of 4, layer 3')")
    assert other.locator(".glass aside .caption").inner_text().startswith("patch in row 3, column 1")
    page.locator("nav button:text-is('Token')").click()
    page.wait_for_selector("h2:text-is('Patch in row 3, column 1')")
    page.go_back()
    page.wait_for_selector("h2:text-is('Head 3 of 4, layer 3')")


def test_an_address_of_nonsense_shows_something(watched: Callable[..., Watched], place: str) -> None:
    seen = watched()
    page = seen.open(place)
    for hash_ in (
        "#/head?m=99&i=99&l=99&h=99&t=9999&a=9999",
        "#/token?l=0&t=-1",
        "#/runs?r=zz&b=..%2f",
        "#/nothing",
    ):
        go(page, hash_)
        page.wait_for_timeout(400)
        assert page.locator(".glass main h2").count() == 1
    assert seen.faults == []


def test_by_keyboard_alone(watched: Callable[..., Watched], place: str) -> None:
    seen = watched()
    page = seen.open(place)
    page.locator(".glass nav button").first.focus()  # in a report the reader tabs here through the page
    for number, view in enumerate(VIEWS, start=1):
        page.keyboard.press(str(number))
        page.wait_for_selector(f"nav button[aria-current=page]:text-is('{view.capitalize()}')")
    page.keyboard.press("3")
    page.wait_for_selector("h2:has-text('Subspace 1 of 8, layer 1')")
    for key in ("]", "]", ".", "["):  # at once: a key counts from what is chosen, whatever is drawn by then
        page.keyboard.press(key)
    page.wait_for_selector("h2:text-is('Subspace 2 of 8, layer 2')")
    page.keyboard.press("m")
    page.wait_for_selector("h2:text-is('Head 2 of 4, layer 2')")
    for _ in range(40):  # by Tab to the picture in the view
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('main .patches')"):
            break
    else:
        pytest.fail("the picture is not reached by Tab")
    page.keyboard.press("Home")
    page.wait_for_function("() => location.hash.includes('t=0')")
    for key, token in (("ArrowDown", 1), ("ArrowRight", 2), ("ArrowDown", 6), ("End", 16), ("ArrowUp", 12)):
        page.keyboard.press(key)
        page.wait_for_function(
            f"() => new URLSearchParams(location.hash.split('?')[1]).get('t') === '{token}'"
        )
    for key in ("Home", "ArrowDown", "ArrowRight", "ArrowDown", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    page.wait_for_function("() => new URLSearchParams(location.hash.split('?')[1]).get('t') === '6'")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"
    assert seen.faults == []


def test_keys_within_one_task_are_all_counted(watched: Callable[..., Watched], place: str) -> None:
    """Faster than any hand: nothing is drawn between these, so none may count from what is."""
    page = watched().open(place)
    go(page, "#/head")
    page.wait_for_selector("h2:text-is('Subspace 1 of 8, layer 1')")
    page.locator(".glass nav button").first.focus()
    page.evaluate(
        """keys => keys.forEach(key => document.activeElement.dispatchEvent(
             new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true})))""",
        ["]", "]", "]", "[", ".", ".", ".", ",", "n", "n", "p", "m", "4"],
    )
    page.wait_for_selector("nav button[aria-current=page]:text-is('Token')")
    assert page.evaluate("location.hash") == "#/token?m=1&i=1&l=3&h=3"


def test_atoms_and_the_patches_that_fire_them(
    watched: Callable[..., Watched], place: str, answers: Answers
) -> None:
    page = watched().open(place)
    go(page, "#/token?l=2&t=5")
    page.wait_for_selector("h3:text-is('The patches that fire it most')")
    code = answers.layer(0, 0, 2)["after"][5]
    best = int(code.argmax())
    first = page.locator(".glass .chips button").first
    assert first.inner_text().split()[0] == str(best)
    assert f"{int((code > 0).sum())} of 64 atoms fire" in page.locator(".glass main").inner_text()
    shots = page.locator(".glass .shot canvas").all()
    values = answers.audit(0)["atoms"]["2"]["values"][best]
    assert len(shots) == int(values.isfinite().sum())
    assert f"{values[0]:.2f}"[:3] in shots[0].get_attribute("aria-label")
    page.locator(".glass .chips button").nth(1).click()
    page.wait_for_function("() => location.hash.includes('a=')")


def test_a_picture_is_dropped_in(watched: Callable[..., Watched], address: str, tmp_path: Path) -> None:
    seen = watched()
    page = seen.open(address)
    go(page, "#/data")
    name = "<img src=x onerror=alert(1)>.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(
        tmp_path / name
    )
    page.set_input_files(".glass input[type=file]", tmp_path / name)
    page.wait_for_selector(".glass [role=status]:has-text('is open')")
    page.wait_for_selector(".glass aside .caption:has-text('<img src=x')")
    assert page.locator(".glass img").count() == 0
    go(page, page.evaluate("location.hash").replace("data", "head"))
    page.wait_for_selector("h2:has-text('Subspace')")
    assert seen.faults == []
    bad = tmp_path / "bad.png"
    bad.write_text("<svg onload=alert(1)>")
    go(page, "#/data")
    page.set_input_files(".glass input[type=file]", bad)
    page.wait_for_selector(".glass [role=status]:has-text('SVG or XML, not a raster image')")


def test_a_run_in_progress_draws_on(watched: Callable[..., Watched], address: str, runs: Path) -> None:
    seen = watched()
    page = seen.open(address)
    go(page, "#/runs")
    page.wait_for_selector("th:text-is('two')")
    page.get_by_role("button", name="show one").click()
    page.get_by_role("button", name="set two beside it").click()
    page.wait_for_selector("caption:text-is('Options that differ')")
    assert "0.25" in page.locator(".glass table").last.inner_text()
    with open(runs / "one" / "metrics.jsonl", "a") as log:
        log.write(
            json.dumps({"step": 4, "epoch": 4, "split": "test", "loss": 7.25}) + "\n" + '{"step": 5, "ep'
        )
    page.wait_for_function("() => document.querySelector('.glass table').innerText.includes('4 / 3')")
    assert seen.faults == []


def test_the_token_leaves_the_address(watched: Callable[..., Watched], address: str) -> None:
    page = watched().open(address)
    assert "token" not in page.evaluate("location.href")
    page.reload()
    page.wait_for_selector(".glass nav button")


def test_in_a_report_the_keys_stay_where_the_reader_is(watched: Callable[..., Watched], report: str) -> None:
    page = watched().open(report)
    page.keyboard.press("3")
    page.wait_for_timeout(200)
    assert page.evaluate("location.hash") == ""
    assert page.locator("#inside").evaluate("e => getComputedStyle(e).display") == "block"
    page.emulate_media(media="print")
    assert page.locator("#inside").evaluate("e => getComputedStyle(e).display") == "none"


# A language model


@pytest.fixture(scope="module")
def reading(text_run: Path) -> Answers:
    answers = open_target(str(text_run))
    assert isinstance(answers, Answers)
    answers.audit_limit = 4
    return answers


@pytest.fixture(scope="module")
def text_address(reading: Answers, serving: Serving) -> Iterator[str]:
    with serving(reading) as guard:
        yield guard.address


@pytest.fixture(scope="module")
def text_report(
    reading: Answers, tmp_path_factory: pytest.TempPathFactory, make_bundle: Callable[..., dict]
) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(make_bundle(task="next"), bundle(reading, half=True)), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(params=["server", "file"])
def text_place(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue({"server": "text_address", "file": "text_report"}[request.param])


@pytest.mark.parametrize("width", [1280, 768, 390])
def test_every_view_of_a_language_model(
    watched: Callable[..., Watched], text_place: str, width: int, reading: Answers
) -> None:
    seen = watched(width=width, scheme="dark" if width == 768 else "light")
    page = seen.open(text_place)
    views_are_silent_and_fit(page, len(reading.subjects))
    go(page, "#/head?i=0&l=2&h=2&t=20")
    page.wait_for_selector("h2:text-is('Subspace 2 of 2, layer 2')")
    words = page.locator(".glass main .words .word")
    assert words.count() == 48
    assert words.nth(0).inner_text() == "<|endoftext|>"
    assert words.nth(4).inner_text() == "·"
    weights = reading.layer(0, 0, 2)["attention"][1, 20]
    assert words.nth(20).evaluate("e => e.classList.contains('chosen')")
    shades = words.evaluate_all(
        "all => all.map(e => Number((/[\\d.]+(?=\\)$)/.exec(e.style.background) ?? [0])[0]))"
    )
    expected = (0.6 * weights / weights.max()).tolist()
    assert shades == pytest.approx(expected, abs=3e-3)
    words.nth(11).click()
    page.wait_for_function("() => location.hash.includes('t=11')")
    page.wait_for_selector(".glass aside .caption:has-text('(word 12)')")
    assert seen.faults == []
    assert foreign(seen, text_place) == []


def test_what_layers_would_say_and_what_atoms_respond_to(
    watched: Callable[..., Watched], text_place: str, reading: Answers
) -> None:
    page = watched().open(text_place)
    go(page, "#/token?i=0&l=2&t=20")
    page.wait_for_selector("h3:text-is('The words that fire it most')")
    lens = reading.look(0, 0)["lens"]
    rows = page.locator(".glass .lens tr")
    assert rows.count() == 3
    for layer in range(3):
        said = rows.nth(layer).locator("td").first.inner_text()
        name, chance = lens["words"][lens["likeliest"][layer, 20, 0]], float(lens["chances"][layer, 20, 0])
        assert said.startswith(name.replace(" ", "·").replace("\n", "↵"))
        assert any(shown_percent(chance * (1 + e)) in said for e in (-2e-3, 0, 2e-3))
    code = reading.layer(0, 0, 2)["after"][20]
    best = int(code.argmax())
    assert page.locator(".glass .chips button").first.inner_text().split()[0] == str(best)
    found = reading.audit(0)
    atoms = found["atoms"]["2"]
    shown = page.locator(".glass .contexts mark").all_inner_texts()
    expected = [found["words"][int(word) - 1] for word in atoms["contexts"][best, :, found["at"]]]
    assert shown == [word.replace(" ", "·").replace("\n", "↵") for word in expected]


def test_a_passage_is_typed(watched: Callable[..., Watched], text_address: str) -> None:
    seen = watched()
    page = seen.open(text_address)
    go(page, "#/data")
    page.fill(".glass textarea", "<img src=x onerror=alert(1)>\nAnd 3 2 1")
    page.get_by_role("button", name="look into it").click()
    page.wait_for_selector(".glass [role=status]:has-text('It is open')")
    page.wait_for_selector(".glass aside .caption:has-text('<img src=x')")
    assert page.locator(".glass img").count() == 0
    assert page.locator(".glass aside .word").count() == 39
    assert page.locator(".glass .guesses li").count() == 10  # of two models
    assert page.evaluate("location.hash").startswith("#/data")  # what is typed is no key of the page
    page.fill(".glass textarea", "x" * 60)
    page.get_by_role("button", name="look into it").click()
    page.wait_for_selector(".glass [role=status]:has-text('61 words, and 48 are looked at at most')")
    assert [fault for fault in seen.faults if "422" not in fault] == []


def test_another_run_is_opened_from_the_folder(
    watched: Callable[..., Watched], text_run: Path, serving: Serving
) -> None:
    answers = open_target(str(text_run), beside=[], runs=text_run)
    assert isinstance(answers, Answers)
    answers.audit_limit = 2
    with serving(answers) as guard:
        seen = watched()
        page = seen.open(guard.address)
        go(page, "#/runs")
        page.get_by_role("button", name="look into beside-gpt2_bytes").click()
        page.wait_for_selector("h2:has-text('GPT-2: its layers state no objective')")
        page.wait_for_selector(".glass .switch button[aria-pressed=true]:text-is('GPT-2')")
        page.wait_for_selector("caption:text-is('The audit, step by step')")
        assert page.locator(".glass .switch button").all_inner_texts() == ["CRATE", "GPT-2"]
        assert seen.faults == []


def test_another_page_gets_nothing(browser: Any, address: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector(".glass nav button")
    base = address.split("/?")[0]
    other = context.new_page()
    other.goto("about:blank")
    got = other.evaluate(
        """async (base) => {
          const asked = (path, options) => fetch(base + path, {credentials: 'include', ...options});
          const tries = [asked('/api/overview', {}), asked('/api/overview', {mode: 'no-cors'}),
                         asked('/api/inputs', {method: 'POST', mode: 'no-cors', body: 'x'})];
          const ended = await Promise.allSettled(tries);
          return ended.map(one => one.status === 'fulfilled' ? one.value.type : 'refused');
        }""",
        base,
    )
    assert set(got) <= {"refused", "opaque"}
    framed = other.evaluate(
        """(base) => new Promise(done => {
          const frame = document.createElement('iframe');
          frame.onload = () => {
            const page = () => frame.contentDocument;
            try { done(page() ? page().body.innerText : 'closed'); }
            catch (e) { done('closed'); }
          };
          frame.src = base + '/'; document.body.append(frame);
        })""",
        base,
    )
    assert "pellucid" not in framed
    context.close()
