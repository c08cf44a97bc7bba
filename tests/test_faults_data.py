"""Faults of data as a user meets them: what the command line says, and what it leaves with.

One test for each row of the table of faults that no other test holds through the commands; each message has
at most five lines, and names the file and the way on.
"""

import json
import os
import socket

import numpy as np
import pytest
from PIL import Image

from pellucid.cli import main
from pellucid.errors import DataError

TINY = ["--model", "crate_digits", "--depth", "1", "--epochs", "1", "--batch-size", "8", "--no-report"]
TEXT = ["--objective", "causal-lm", "--model", "crate_gpt_bytes", "--depth", "1", "--embed-dim", "16"]
TEXT += ["--num-heads", "2", "--model-arg", "context=64", "--epochs", "1", "--batch-size", "4", "--no-report"]


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Two classes of six; the working folder is the one around them."""
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        picture(tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.png", number)
    return tmp_path / "photos"


@pytest.fixture
def said(capsys):
    """``said(*argv) -> (code, lines on stdout, message on stderr)``."""

    def run(*argv):
        capsys.readouterr()
        code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        lines = (out + err).replace("\n", "")
        assert lines.isprintable() or any("\t" <= c <= "\r" for c in lines), lines  # bars return the carriage
        message = err[err.rindex("error: ") :].strip() if "error: " in err else ""
        assert len(message.splitlines()) <= 5
        assert (code == 0) == (message == "")
        return code, out.splitlines(), message

    return run


# --- 12: pictures that cannot be read ------------------------------------------------------------------


def test_row_12_what_is_left_out_is_named(photos, said):
    (photos / "cat" / "page.jpg").write_text("<html>not found</html>")
    (photos / "dog" / "nothing.png").write_bytes(b"")
    argv = ["train", "photos", *TINY, "--max-bad", "0.2", "--out", "run"]
    code, out, _ = said(*argv)
    assert code == 0
    assert out[0].startswith(
        "2 images rejected (photos/dog/nothing.png: empty file (0 bytes); photos/cat/page.jpg: "
    )
    assert out[0].endswith("an HTML page, not an image) - pellucid check lists all, so does result.json")
    rejects = json.loads((photos.parent / "run" / "result.json").read_text())["rejects"]
    assert {reject["path"]: reject["reason"] for reject in rejects} == {
        "photos/dog/nothing.png": "empty file (0 bytes)",
        "photos/cat/page.jpg": "an HTML page, not an image",
    }


def test_row_12_too_many(photos, said):
    for number in range(3):
        whole = (photos / "cat" / f"{2 * number}.png").read_bytes()
        (photos / "cat" / f"{2 * number}.png").write_bytes(whole[: len(whole) // 2])
    code, _, message = said("train", "photos", *TINY, "--out", "run")
    assert code == DataError.exit_code
    summary, named = message.splitlines()
    limit = "error: 3 of 12 images rejected (25.00%, limit 1.00%)"
    assert summary == f"{limit} - photos - replace them, or raise --max-bad"
    assert sorted(named.strip().split("; ")) == [f"cat/{number}.png: truncated" for number in (0, 2, 4)]
    assert not (photos.parent / "run").exists()


# --- 14, 15: kinds of pictures -------------------------------------------------------------------------


def test_row_14_pixels_without_a_range(photos, said):
    Image.fromarray(np.zeros((8, 8), np.float32)).save(photos / "cat" / "x.tif")
    code, _, message = said("check", "photos")
    assert code == DataError.exit_code
    code, _, message = said("train", "photos", *TINY)
    assert code == DataError.exit_code
    assert "cat/x.tif: floating-point pixels have no stated range; save it as 8 or 16 bit" in message


def test_row_15_of_an_animation_the_first_frame(photos, said):
    first, second = (Image.open(photos / "cat" / f"{number}.png") for number in (0, 2))
    first.save(photos / "cat" / "moving.png", save_all=True, append_images=[second])
    code, out, _ = said("check", "photos")
    assert code == 0
    assert out[0] == "photos: 13 images in 2 classes, 11 + 2"


# --- 17, 18: folders -----------------------------------------------------------------------------------


def test_row_17_one_level_too_high(photos, said):
    for part in ("train", "val"):
        for number in range(4):
            folder = photos.parent / "outer" / "set" / part / ("cat", "dog")[number % 2]
            picture(folder / f"{number}.png", number)
    code, _, message = said("train", "outer", *TINY)
    assert code == DataError.exit_code
    assert message.endswith("did you mean outer/set?")


def test_row_18_classes_that_cannot_be(photos, said):
    (photos / "eel").mkdir()
    code, out, message = said("check", "photos")
    assert code == DataError.exit_code
    assert 'problem: class "eel" has no images - photos - add images to that folder or remove it' in out
    picture(photos / "eel" / "1.png")
    code, _, message = said("train", "photos", *TINY)
    assert code == DataError.exit_code
    assert message == (
        'error: class "eel" has 1 image and cannot be split into train and test - photos - add images or '
        "remove the folder"
    )


def test_row_18_a_class_that_was_never_trained_on(photos, said):
    (photos.parent / "set").mkdir()
    photos.rename(photos.parent / "set" / "train")
    for number, name in enumerate(("cat", "dog", "newt")):
        picture(photos.parent / "set" / "val" / name / "x.png", 50 + number)
    code, _, message = said("train", "set", *TINY)
    assert code == DataError.exit_code
    assert message == (
        'error: classes without training images: "newt" - set/val - add them to set/train or remove them'
    )


# --- 19, 20, 21: names, links, and what is no file -----------------------------------------------------


def test_row_19_any_name_trains_and_resumes(photos, said):
    names = [
        os.fsdecode(b"caf\xe9\xff.png"),
        "new\nline\x1b[31m.png",
        "n" * 200 + ".png",
        "\U0001f600.png",
        "A.png",
        "a.png",
        "<img src=x onerror=alert(1)>.png",
    ]
    for number, name in enumerate(names):
        picture(photos / "cat" / name, 100 + number)
    (photos / "dog" / os.fsdecode(b"bad\xff\n\x1b[2J.png")).write_bytes(b"no picture")
    argv = ["train", "photos", *TINY, "--max-bad", "0.1", "--out", "run"]
    code, out, _ = said(*argv)
    assert code == 0
    assert out[0].startswith(r"1 image rejected (photos/dog/bad\udcff\n\x1b[2J.png: text, not an image)")
    code, out, _ = said(*argv, "--resume")
    assert code == 0
    assert any(line.startswith("resuming from step") for line in out)


def test_row_20_every_real_file_once(photos, said):
    (photos / "cat" / "loop").symlink_to("..")
    (photos / "dog" / "elsewhere").symlink_to("/")
    os.link(photos / "cat" / "0.png", photos / "dog" / "hard.png")
    code, out, _ = said("check", "photos")
    assert code == 0
    assert out[0] == "photos: 12 images in 2 classes, 10 + 2"
    notes = [line for line in out if line.startswith("note: ")]
    assert notes == [
        "note: photos/cat/loop is a link to a folder, not followed",
        "note: photos/dog/elsewhere is a link to a folder, not followed",
    ]


def test_row_21_what_is_no_file_is_named_and_never_waited_for(photos, said):
    os.mkfifo(photos / "cat" / "pipe.png")
    (photos / "cat" / "zero.png").symlink_to("/dev/zero")
    (photos / "dog" / "gone.png").symlink_to("nowhere")
    os.chdir(photos / "dog")  # a socket's path is at most a hundred characters
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    os.chdir(photos.parent)
    code, out, _ = said("check", "photos", "--max-bad", "0.5")
    assert code == 0
    assert {line.strip() for line in out if line.startswith("  photos/")} == {
        "photos/cat/pipe.png: not a regular file (named pipe)",
        "photos/cat/zero.png: not a regular file (device)",
        "photos/dog/gone.png: no such file",
        "photos/dog/socket.png: not a regular file (socket)",
    }
    code, _, message = said("train", "photos", *TINY)
    assert code == DataError.exit_code
    assert "cat/pipe.png: not a regular file (named pipe)" in message


def test_row_21_a_file_that_may_not_be_read(photos, said, monkeypatch):
    """root may read everything, so it is the system's answer that is put in place."""
    from pellucid.data import images

    def refused(path):
        if str(path).endswith("cat/0.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path)

    opened = images.open_regular
    monkeypatch.setattr(images, "open_regular", refused)
    code, _, message = said("train", "photos", *TINY)
    assert code == DataError.exit_code
    assert "cat/0.png: permission denied" in message


# --- 39: text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"caf\xe9 au lait" * 9, "a.txt: not UTF-8: byte 0xe9 at 3"), (b"", "a.txt: empty file")],
)
def test_row_39_what_is_no_text_is_named(tmp_path, said, monkeypatch, data, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes(data)
    code, out, _ = said("check", "texts")
    assert code == DataError.exit_code
    assert reason in "\n".join(out)
    code, _, message = said("train", "texts", *TEXT)
    assert code == DataError.exit_code
    assert message == (
        f"error: 1 of 1 texts rejected (100.00%, limit 1.00%) - texts - replace them, or raise --max-bad\n"
        f"  {reason}"
    )


def test_row_39_one_text_and_texts_shorter_than_the_context(tmp_path, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("short")
    code, _, message = said("train", "texts", *TEXT)
    assert code == DataError.exit_code
    assert message == (
        "error: 1 text cannot be split into train and test - texts - add texts, or name the file itself, "
        "which is cut into parts"
    )
    (tmp_path / "texts" / "b.txt").write_text("also short")
    code, out, _ = said("train", "texts", *TEXT, "--out", "run")
    assert code == 0
    assert "of all places stay empty: most texts are shorter than the context of 64 words" in out[0]
    assert out[0].endswith("take a smaller one, or --cross-documents")


def test_row_39_one_huge_line(tmp_path, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x" * 1_000_000)
    (tmp_path / "texts" / "b.txt").write_text("a line\n" * 1000)
    code, out, _ = said("check", "texts")
    assert code == 0
    assert "bytes: 7,000 smallest, 1,000,000 median, 1,000,000 largest, 1,007,000 together" in out
