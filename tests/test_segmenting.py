"""``pellucid segment`` as a user types it: what it writes, and every wrong input with its one short
message."""

import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from pellucid.cli import main
from pellucid.errors import ConfigError, DataError
from pellucid.measure import coco
from pellucid.models import CRATE, create_model
from pellucid.segmenting import METHODS, MOST_PATCHES, Options, fitted_size, segment

MODEL = "crate_digits"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    made = CRATE(**sizes, stem="conv").eval()
    made.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return made


@pytest.fixture
def pictures(tmp_path):
    """Colour, gray and a strip, each of another size: a square on a background."""
    found = []
    for name, (height, width), channels in (
        ("a.png", (60, 90), 3),
        ("b.png", (37, 33), 1),
        ("c.png", (9, 80), 3),
    ):
        pixels = np.full((height, width, channels), 60, dtype=np.uint8)
        pixels[height // 4 : height // 2, width // 4 : width // 2] = 220
        Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels).save(tmp_path / name)
        found.append(tmp_path / name)
    return found


def refused(capsys, argv, *said):
    capsys.readouterr()
    assert main([str(word) for word in argv]) in (2, 3, 4)  # tests/test_faults.py: which
    message = capsys.readouterr().err
    assert message.startswith("error: "), message
    assert len(message.splitlines()) <= 5, message
    for words in said:
        assert words in message, message


def check_coco(data):
    """What the format asks of a file, from its description."""
    assert {"images", "annotations", "categories"} <= data.keys()
    images = {image["id"]: image for image in data["images"]}
    categories = {category["id"] for category in data["categories"]}
    assert len(images) == len(data["images"])
    assert len(categories) == len(data["categories"])
    assert len({each["id"] for each in data["annotations"]}) == len(data["annotations"])
    for each in data["annotations"]:
        image = images[each["image_id"]]
        assert each["category_id"] in categories
        assert each["segmentation"]["size"] == [image["height"], image["width"]]
        mask = coco.decode(each["segmentation"])
        assert each["area"] == int(mask.sum()) > 0
        left, top, width, height = each["bbox"]
        inside = torch.zeros_like(mask)
        inside[top : top + height, left : left + width] = True
        assert not (mask & ~inside).any()
        assert mask[top].any()
        assert mask[:, left].any()
        assert mask[top + height - 1].any()
        assert mask[:, left + width - 1].any()
        assert each["iscrowd"] == 0


def test_what_is_written(model, pictures, tmp_path):
    out = tmp_path / "out"
    told = []
    done = segment(model, pictures, out, progress=told.append)
    assert (done.images, done.unread, told) == (3, [], [1, 1, 1])
    assert done.masks["heads"] == 6
    about = json.loads((out / "about.json").read_text())
    for method in METHODS:
        data = json.loads((out / f"{method}.json").read_text())
        check_coco(data)
        assert [(i["height"], i["width"]) for i in data["images"]] == [(60, 90), (37, 33), (9, 80)]
        assert len(data["annotations"]) == done.masks[method]
        for each in data["annotations"]:
            image = data["images"][each["image_id"] - 1]
            names = [
                n for n in about["files"] if n.startswith(f"masks/{each['image_id']:04d}-") and method in n
            ]
            drawn = [np.asarray(Image.open(out / name)) for name in names]
            assert all(pixels.shape == (image["height"], image["width"]) for pixels in drawn)
            assert all(set(np.unique(pixels)) <= {0, 255} for pixels in drawn)
            mask = coco.decode(each["segmentation"]).numpy()
            assert any(np.array_equal(pixels == 255, mask) for pixels in drawn)
    assert [c["name"] for c in json.loads((out / "heads.json").read_text())["categories"]] == [
        "head 1",
        "head 2",
    ]
    for method in ("maskcut", "tokencut", "pca"):
        assert Image.open(out / "overlays" / f"0001-a-{method}.png").size == (90, 60)
    on_disk = {os.path.relpath(os.path.join(at, n), out) for at, _, names in os.walk(out) for n in names}
    assert on_disk == {*about["files"], "about.json"}
    assert {image["file_name"] for image in about["images"]} == {str(path) for path in pictures}


def test_the_same_again(model, pictures, tmp_path):
    for name in ("one", "two"):
        segment(model, pictures, tmp_path / name)
    files = json.loads((tmp_path / "one" / "about.json").read_text())["files"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_finer_view(model, pictures, tmp_path):
    segment(model, pictures[:1], tmp_path / "out", Options(methods=["maskcut"], size=96, masks=1))
    assert not (tmp_path / "out" / "heads.json").exists()
    page = (tmp_path / "out" / "index.html").read_text()
    assert "90 x 60 pixels, seen as 18 x 12 patches" in page
    assert "TokenCut of" not in page


@pytest.mark.parametrize(
    ("picture", "shorter", "size"),
    [
        ((60, 90), None, (32, 48)),
        ((32, 32), None, (32, 32)),
        ((100, 130), 64, (64, 80)),
        ((1, 1), None, (32, 32)),
        ((3000, 1000), 1, (8, 8)),
        ((3000, 1000), 10, (32, 8)),
    ],
)
def test_the_size_is_the_pictures_shape(model, picture, shorter, size):
    assert fitted_size(model, *picture, shorter) == size


@pytest.mark.parametrize("picture", [(1, 50_000_000), (50_000_000, 1), (7000, 7000), (31, 90_000)])
@pytest.mark.parametrize("shorter", [None, 5000])
def test_no_picture_has_too_many_patches(model, picture, shorter):
    height, width = fitted_size(model, *picture, shorter)
    assert height % 8 == width % 8 == 0
    assert 1 <= height // 8 * width // 8 <= MOST_PATCHES
    assert (height >= width) == (picture[0] >= picture[1])


def test_the_command(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["segment", MODEL, *map(str, pictures), "-o", str(out), "--methods", "heads", "pca"]
    assert main([*argv, "--threshold", "mass", "--share", "0.5"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"3 pictures, masks: heads \d+, pca \d+", said)
    assert f"the sheet: {out / 'index.html'}" in said
    about = json.loads((out / "about.json").read_text())
    assert about["model"] == MODEL
    assert (about["options"]["by"], about["options"]["share"], about["layer"]) == ("mass", 0.5, 3)
    refused(capsys, argv, "stands there already", "--overwrite")
    before = (out / "index.html").read_bytes()
    assert main([*argv, "--overwrite", "--layer", "1"]) == 0
    assert (out / "index.html").read_bytes() != before


def test_nothing_of_others_is_overwritten(model, pictures, tmp_path, capsys):
    argv = ["segment", MODEL, pictures[0], "--overwrite", "-o"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    refused(capsys, [*argv, other], "was not written by segment", "it is left as it is")
    out = tmp_path / "out"
    segment(model, pictures, out, Options(methods=["pca"]))
    (out / "masks" / "painted.png").write_text("mine")
    refused(capsys, [*argv, out], "holds masks/painted.png", "it is left as it is")
    assert (out / "masks" / "painted.png").read_text() == "mine"
    (out / "masks" / "painted.png").unlink()
    (out / "link").symlink_to(other)
    refused(capsys, [*argv, out], "holds link")
    (out / "link").unlink()
    refused(capsys, [*argv, pictures[1]], "was not written by segment")
    assert Image.open(pictures[1]).size == (33, 37)
    # What fails on the way leaves what stood there.
    before = sorted(p.name for p in out.rglob("*"))
    refused(capsys, [*argv, out, "--layer", "9"], "layer is 9")
    assert sorted(p.name for p in out.rglob("*")) == before
    assert not list(tmp_path.glob(".tmp-*"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([str(word) for word in [*argv[:3], "-o", empty]]) == 0


def test_an_unreadable_picture_is_named_and_the_others_are_done(pictures, tmp_path, capsys):
    bad, gone = tmp_path / "torn.png", tmp_path / "gone.png"
    bad.write_bytes(pictures[0].read_bytes()[:60])
    out = tmp_path / "out"
    argv = ["segment", MODEL, pictures[0], bad, gone, pictures[1], "-o", out, "--methods", "maskcut"]
    refused(capsys, argv, "2 of 4 images could not be read", "torn.png", "gone.png")
    about = json.loads((out / "about.json").read_text())
    assert [image["file_name"] for image in about["images"]] == [str(pictures[0]), str(pictures[1])]
    assert [each["file_name"] for each in about["unread"]] == [str(bad), str(gone)]
    nothing = tmp_path / "nothing"
    refused(
        capsys, ["segment", MODEL, bad, tmp_path, "-o", nothing], "none of 2 images can be read", "torn.png"
    )
    assert not nothing.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--masks", "0"], "masks is 0"),
        (["--size", "0"], "size is 0"),
        (["--share", "1.5"], "share is 1.5"),
        (["--tau", "3"], "tau is 3"),
        (["--layer", "5"], "has 1 to 4"),
        (["--methods", "maskcat"], "maskcat"),
    ],
)
def test_options_that_cannot_be(options, said, pictures, tmp_path, capsys):
    refused(capsys, ["segment", MODEL, pictures[0], "-o", tmp_path / "out", *options], said)
    assert not (tmp_path / "out").exists()


def test_no_image_and_no_such_method(model, tmp_path, capsys):
    refused(capsys, ["segment", MODEL, "-o", tmp_path / "out"], "no images given")
    with pytest.raises(DataError, match="no images"):
        segment(model, [], tmp_path / "out")
    with pytest.raises(ConfigError, match="did you mean 'maskcut'"):
        Options(methods=["mascut"])
    with pytest.raises(ConfigError, match="no method is given"):
        Options(methods=[])
    with pytest.raises(ConfigError, match="by is 'number'"):
        Options(by="number")


def test_a_folder_that_cannot_be_written(model, pictures, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        segment(model, pictures[:1], tmp_path / "file" / "out")


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.alts = set(), set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.alts.add(dict(attributes).get("alt"))


HOSTILE = [
    "<img src=x onerror=alert(1)>.png",
    "a\nb\x1b[31m.png",
    "quote\"'&.png",
    "名前.png",
    "..png",
    "x" * 200 + ".png",
]


def test_names_are_text_wherever_they_stand(model, pictures, tmp_path, capsys):
    paths = [os.path.join(tmp_path, name) for name in HOSTILE]
    paths.append(os.path.join(os.fsencode(tmp_path), b"\xff\xfe.png"))
    for path in paths:
        with open(path, "wb") as file:
            file.write(pictures[0].read_bytes())
    out = tmp_path / "out"
    done = segment(model, [os.fsdecode(path) for path in paths], out, Options(methods=["maskcut", "heads"]))
    assert done.images == len(paths)
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert "\x1b" not in page
    seen = Tags()
    seen.feed(page)
    assert any(alt and "名前.png" in alt for alt in seen.alts)
    assert "&lt;img src=x onerror=alert(1)&gt;.png" in page
    about = json.loads((out / "about.json").read_text())
    for name in about["files"]:
        assert re.fullmatch(r"[A-Za-z0-9_./-]+", name), name
    for image in about["images"]:
        assert image["file_name"].isprintable()
    json.loads((out / "maskcut.json").read_text())


def test_the_sheet_of_many_pictures_stays_small(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("pellucid.segmenting.MOST_SHOWN", 2)
    segment(model, pictures, tmp_path / "out", Options(methods=["pca", "tokencut"]))
    page = (tmp_path / "out" / "index.html").read_text()
    assert "The first 2 of 3 pictures" in page
    assert page.count("<section") == 2
    assert len(json.loads((tmp_path / "out" / "pca.json").read_text())["images"]) == 3
    assert not re.search(r"https?://", page)


@pytest.mark.parametrize("name", ["tost_digits", "vit_digits", "crate_strict_digits"])
def test_other_models(name, pictures, tmp_path):
    done = segment(create_model(name).eval(), pictures, tmp_path / "out")
    assert done.images == 3
    check_coco(json.loads((tmp_path / "out" / "heads.json").read_text()))
