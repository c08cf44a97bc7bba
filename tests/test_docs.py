"""What the pages say, they do: every block of Python runs, and the site builds without a warning."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
SLOW = {"README.md", "06_diffusion.md"}  # train for half a minute and more

BLOCK = re.compile(r"^```python(?P<mark>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"!\[[^]]*\]\(pictures/([^)]+)\)")
LECTURE = re.compile(r"\d\d_\w+\.md")


def blocks(text: str) -> list[tuple[int, str, str]]:
    """``(lines in front, what follows "python" in the fence, code)`` of every block in order."""
    return [
        (text.count("\n", 0, hit.start("code")), hit["mark"].strip(), hit["code"])
        for hit in BLOCK.finditer(text)
    ]


def run(page: Path, pictures: Path) -> None:
    """All blocks of a page in one namespace; an error is reported at its line of the page."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    namespace = {"__name__": "__main__", "plt": plt, "pictures": pictures}
    with plt.rc_context():
        for line, mark, code in blocks(page.read_text(encoding="utf-8")):
            if mark != "no-run":
                exec(compile("\n" * line + code, str(page), "exec"), namespace)  # noqa: S102  our own pages
    plt.close("all")


def params(pages: list[Path]) -> list:
    return [
        pytest.param(page, id=page.name, marks=[pytest.mark.slow] * (page.name in SLOW)) for page in pages
    ]


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> Path:
    """A folder to draw into, inside the working directory of the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    folder = tmp_path / "pictures"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("page", params([page for page in PAGES if blocks(page.read_text(encoding="utf-8"))]))
def test_a_page_runs(page, pictures):
    run(page, pictures)
    if LECTURE.fullmatch(page.name):
        shown = set(PICTURE.findall(page.read_text(encoding="utf-8")))
        drawn = {path.name for path in pictures.iterdir()}
        assert shown == drawn, "the pictures that a page shows are those that its code draws"
        assert all((pictures / name).stat().st_size > 1000 for name in drawn)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_whole(page):
    text = page.read_text(encoding="utf-8")
    for name in PICTURE.findall(text):
        assert (DOCS / "pictures" / name).is_file(), (
            f"{page.name} shows {name}, which is not in docs/pictures"
        )
    for line, mark, code in blocks(text):
        assert mark in ("", "no-run"), f"{page.name}:{line}: '{mark}' is no mark that the runner knows"
        ast.parse(code)
    if LECTURE.fullmatch(page.name):
        assert blocks(text), "a page of the lecture has code"
        assert PICTURE.search(text), "a page of the lecture has a picture"


def test_the_runner_sees_every_block_and_reports_its_line(tmp_path, pictures):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n```python\nx = 1\n```\ntext\n```python no-run\nx = 2\n```\n```\nx = 3\n```\n"
        "```python\nassert x == 1\n(pictures / 'a').write_text('a')\nassert x == 2, 'x is still 1'\n```\n"
    )
    assert [(line, mark) for line, mark, _ in blocks(page.read_text())] == [(3, ""), (7, "no-run"), (13, "")]
    with pytest.raises(AssertionError, match="x is still 1") as error:
        run(page, pictures)
    assert (error.traceback[-1].path, error.traceback[-1].lineno + 1) == (page, 16)
    assert (pictures / "a").is_file()


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_no_other_host(tmp_path):
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "-E",
        "-b",
        "html",
        str(DOCS),
        str(tmp_path / "site"),
    ]
    blocked = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environment = {**os.environ, **blocked, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "site").glob("*.html")}
    assert {page.stem for page in PAGES[1:]} <= made.keys()
    for name, text in made.items():
        fetched = re.findall(
            r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["'](?:https?:)?//[^"']+""", text
        )
        assert not fetched, f"{name} asks another host: {fetched[:3]}"
    for name in ("train", "audit", "compare"):
        assert f"Usage: pellucid {name}" in made["cli"]
    assert "crate_strict_digits" in made["models"]
    assert "<math" in made["models"]
    assert "pellucid.steps.unroll" in made["api"]


def test_every_fault_names_tests_that_exist():
    """The table of docs/reliability.md: all of its rows, and whatever a row says holds it."""
    page = (DOCS / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", page, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 40))
    for number, cell in rows:
        named = re.findall(r"`([^`]+)`", cell)
        assert named, number
        for name in named:
            file, _, test = name.partition("::")
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert f"\ndef {test or 'test_'}" in text, name
