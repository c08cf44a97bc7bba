"""``check`` on text: all that is wrong, listed and not raised."""

import json

import pytest

from pellucid.data import TextReport, check


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def several(count, folder=""):
    return {f"{folder}{i:02}.txt": f"text {i} of {folder}" for i in range(count)}


def test_a_folder_that_is_well(tmp_path):
    report = check(write(tmp_path / "letters", several(10, "cat/") | several(10, "dog/")))
    assert isinstance(report, TextReport)
    assert report.ok
    assert report.class_counts == {"cat": (9, 1), "dog": (9, 1)}
    assert report.lines() == [
        "letters: 20 texts in 2 classes, 18 + 2",
        "  cat: 9 to train on, 1 to test on",
        "  dog: 9 to train on, 1 to test on",
        "bytes: 14 smallest, 14 median, 14 largest, 280 together",
        "ok",
    ]


def test_all_that_is_wrong_at_once(tmp_path):
    files = (
        several(5, "train/")
        | several(3, "val/")
        | {"train/bad\x1b.txt": b"\xff", "train/same.txt": "text 0 of val/"}
    )
    report = check(write(tmp_path / "letters", files))
    assert not report.ok
    assert report.count == (6, 3)
    assert (report.equal, report.shared) == (1, 1)
    text = "\n".join(report.lines())
    assert "\x1b" not in text
    for line in (
        "1 texts equal an earlier one",
        "1 rejected",
        "train/bad\\x1b.txt: not UTF-8: byte 0xff at 0",
        "1 test texts are also in train, so scores will be too good",
        "problem: 1 of 10 texts rejected (10.00%, limit 1.00%)",
        "not ok",
    ):
        assert line in text


def test_one_text_and_none(tmp_path):
    report = check(write(tmp_path / "one", {"a.txt": "words"}))
    assert report.count == (1, 0)
    assert "problem: 1 text cannot be split into train and test" in "\n".join(report.lines())
    report = check(write(tmp_path / "none", {"a.txt": ""}))
    assert not report.ok
    assert report.lines()[-3].startswith("problem: no text found in")
    assert report.lines()[-2] == "  a.txt: empty file"


@pytest.mark.parametrize("name", ["x.jsonl", "sub/x.jsonl"])
def test_lines_of_json(tmp_path, name):
    rows = "\n".join(json.dumps({"text": f"text {i}"}) for i in range(20))
    write(tmp_path, {name: rows})
    report = check(tmp_path / name.split("/")[0])
    assert report.ok
    assert report.count == (18, 2)


def test_pictures_stay_pictures(tmp_path):
    assert not isinstance(check(write(tmp_path, {"a.png": "x", "README.txt": "about"})), TextReport)
