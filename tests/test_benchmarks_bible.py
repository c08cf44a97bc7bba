"""Chapters and passages of a small book: what is written, what is held back, what the table says."""

import importlib.util
import itertools
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bible.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("bible", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def chapters(script):
    """Two books of ten chapters, of verses 1 to 221 bytes long."""
    lines = [
        f"{book}{chapter}:{verse} {'abcdefghij'[chapter - 1]}{'word ' * (verse % 45)}".rstrip()
        for book in ("2Ki", "Mat")
        for chapter in range(1, 11)
        for verse in range(1, 56)
    ]
    return script.chapters_of("\n".join(lines) + "\n")


def test_chapters_are_verses_without_their_names(chapters):
    assert [c.name for c in chapters[:2]] == ["01-2Ki-001", "01-2Ki-002"]
    assert chapters[10].name == "02-Mat-001"
    assert [c.testament for c in chapters] == ["old"] * 10 + ["new"] * 10
    assert chapters[1].text.startswith("bword\nbword word\n")


def test_what_is_no_verse_is_named(script):
    with pytest.raises(SystemExit, match="line 2 is no verse"):
        script.chapters_of("Ge1:1 In the beginning\nand so on\n")


def test_every_tenth_chapter_is_held_back(script, chapters):
    parts = script.split(chapters)
    assert len(parts["val"]) == 2
    assert sorted(parts["train"] + parts["val"]) == sorted(chapters)
    assert parts["val"] == script.split(chapters)["val"] != script.split(chapters, seed=1)["val"]


def test_passages_are_whole_verses_that_fit(script, chapters):
    for chapter in chapters:
        passages = script.passages_of(chapter)
        assert "".join(passages) == chapter.text
        assert all(len(passage) <= 254 for passage in passages)
        for passage, after in itertools.pairwise(passages):
            assert len(passage + after.splitlines()[0]) + 1 > 254
    long = script.Chapter("", "old", ["a", "b" * 254, "c" * 253])
    assert script.passages_of(long) == ["a\n", "c" * 253 + "\n"]


def test_what_is_written_and_what_is_left_alone(script, chapters, tmp_path):
    parts = script.split(chapters)
    script.write_chapters(tmp_path / "chapters", parts)
    assert len(list((tmp_path / "chapters" / "train").iterdir())) == 18
    held = parts["val"][0]
    assert (tmp_path / "chapters" / "val" / f"{held.name}.txt").read_text() == held.text
    script.write_chapters(tmp_path / "chapters", parts)  # the same again
    (tmp_path / "chapters" / "val" / f"{held.name}.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds something else"):
        script.write_chapters(tmp_path / "chapters", parts)
    assert (tmp_path / "chapters" / "val" / f"{held.name}.txt").read_text() == "mine"


def test_classes_are_of_one_size(script, chapters, tmp_path):
    parts = {"train": chapters[:8] + chapters[10:18], "val": chapters[8:10] + chapters[18:]}
    script.write_passages(tmp_path / "passages", parts, 8)
    for part, count in (("train", 8), ("val", 2)):
        for testament in ("old", "new"):
            files = sorted((tmp_path / "passages" / part / testament).iterdir())
            assert len(files) == count
            own = [c for c in parts[part] if c.testament == testament]
            assert all(any(f.read_text() in c.text for c in own) for f in files)
    with pytest.raises(SystemExit, match="not 9999 - take fewer"):
        script.write_passages(tmp_path / "more", parts, 9999)
    assert not (tmp_path / "more").exists()


def test_passes_over_the_text(script, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.txt").write_text("x" * 400)
    assert script.passes(tmp_path, 1000) == 2.5


def test_the_table_is_of_means_and_spreads(script):
    rows = [
        {"model": name, "seed": seed, "parameters": 1000, "bits per byte": value}
        for name, values in (("crate_gpt_bytes", (2.1, 2.3)), ("gpt2_bytes", (1.9, 2.1)))
        for seed, value in enumerate(values)
    ]
    script.beside(rows, "bits per byte")
    text = script.table(rows, ("model",), {"bits per byte": 3, "% to baseline": 1})
    assert text.splitlines() == [
        "| model | parameters | bits per byte | % to baseline |",
        "|---|---|---|---|",
        "| crate_gpt_bytes | 1,000 | 2.200 ± 0.141 | 10.0 ± 7.1 |",
        "| gpt2_bytes | 1,000 | 2.000 ± 0.141 | 0.0 ± 7.1 |",
    ]
