"""The builder of the emoji data set, on packages made up here: nothing is fetched."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pellucid.data import load_data

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "emoji.py"
spec = importlib.util.spec_from_file_location("emoji", SCRIPT)
emoji = importlib.util.module_from_spec(spec)
sys.modules["emoji"] = emoji  # dataclasses look their module up
spec.loader.exec_module(emoji)

WITHOUT = "1F700"
"""An emoji that Twitter has not drawn, and for which its set shows another artist's."""


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def drawing(code, artist):
    """A shape on nothing, in a colour that says its code point and artist."""
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    shade = int(code.split("-")[-1], 16) % 200
    pixels[10:50, 20:40] = (shade, {"google": 50, "twitter": 120, "fluent": 200}[artist], 30, 255)
    return png(Image.fromarray(pixels))


def codes():
    """Twelve emoji of every group; the first of "People & Body" as a person, a man and a woman."""
    listed = []
    for k, group in enumerate(emoji.GROUPS.values()):
        listed += [(f"{0x1F700 + 16 * k + i:X}", group) for i in range(12)]
    farmers = [f"{who}-200D-1F33E" for who in ("1F9D1", "1F468", "1F469")]
    return listed + [(code, "People & Body") for code in farmers]


def listing():
    flag = {"unified": "1F1EA-1F1EC", "category": "Flags", "sort_order": 0, "has_img_twitter": True}
    return [flag] + [
        {"unified": f"{code}-FE0F", "category": group, "sort_order": i, "has_img_twitter": code != WITHOUT}
        for i, (code, group) in enumerate(codes())
    ]


def add(archive, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    for artist, package in emoji.EMOJI.items():
        with tarfile.open(folder / package.file, "w:gz") as archive:
            add(archive, "package/emoji.json", json.dumps(listing()).encode())
            add(archive, f"package/img/{artist}/sheets/64.png", b"not read")
            for code, _ in codes():
                add(archive, f"package/{package.pictures}/{code.lower()}.png", drawing(code, artist))
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(folder / "scikit_image-0.26.0-cp312-any.whl", "w") as archive:
        for split, names in emoji.BACKGROUNDS.items():
            for name in names:
                # Photographs to train on have no blue, those to test on nothing else.
                photo = rng.integers(100, 256, (80, 100, 3), dtype=np.uint8)
                photo[..., [2] if split == "train" else [0, 1]] = 0
                archive.writestr(f"{emoji.PHOTOS.pictures}/{name}", png(Image.fromarray(photo)))
    return folder


def make(out, packages, *options):
    command = [sys.executable, SCRIPT, out, "--train", "30", "--val", "9", "--packages", packages, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def built(packages, tmp_path_factory):
    out = tmp_path_factory.mktemp("emoji") / "set"
    done = make(out, packages)
    assert done.returncode == 0, done.stderr
    assert "240 for train and 72 for val, 32 px, 8 classes" in done.stdout
    return out


def files(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def code_points(folder):
    """``code point`` of every picture: names are CODE-ARTIST-NUMBER."""
    return {path.stem.rsplit("-", 2)[0] for path in folder.rglob("*.png")}


def test_it_loads_as_a_data_set(built):
    images = load_data(str(built))
    assert images.class_names == sorted(emoji.GROUPS)
    assert (len(images.train), len(images.test)) == (240, 72)
    assert np.bincount(images.train.labels).tolist() == [30] * 8
    assert not images.rejects
    with Image.open(next((built / "train" / "food").iterdir())) as picture:
        assert (picture.mode, picture.size) == ("RGB", (32, 32))


def test_no_emoji_stands_in_both_splits_nor_its_man_or_woman(built):
    train, val = (code_points(built / split) for split in ("train", "val"))
    assert len(train) > 60
    assert len(val) > 12
    assert not train & val
    assert not {emoji.family(code) for code in train} & {emoji.family(code) for code in val}
    farmers = {code for code in train | val if code.endswith("1F33E")}
    assert len(farmers) == 3
    assert farmers <= train or farmers <= val
    assert "1F1EA-1F1EC" not in train | val


@pytest.mark.parametrize(
    ("code", "kin"),
    [("1F468-200D-1F33E", "1F33E"), ("1F3C3-200D-2640", "1F3C3"), ("1F468", "1F468"), ("1F600", "1F600")],
)
def test_families(code, kin):
    assert emoji.family(code) == kin


def test_a_gap_filled_with_anothers_drawing_is_passed_over(packages):
    found = {name for _, name, _ in emoji.read_emoji(packages)["Smileys & Emotion"]}
    assert {f"{WITHOUT}-google", f"{WITHOUT}-fluent"} <= found
    assert f"{WITHOUT}-twitter" not in found


def test_every_mask_is_the_emoji(built):
    pictures = sorted(path for split in ("train", "val") for path in (built / split).rglob("*.png"))
    assert len(pictures) == 312
    for path in pictures:
        mask = np.asarray(Image.open(built / "masks" / path.relative_to(built))).astype(int)
        assert mask.shape == (32, 32)
        rows, columns = np.nonzero(mask.max(1))[0], np.nonzero(mask.max(0))[0]
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert 0.4 * 32 - 1 <= height <= 0.9 * 32 + 1  # the drawings are twice as high as wide
        assert width == pytest.approx(height / 2, abs=1)
        # Inside, the colour that the drawing was given: its red says the code point.
        code, artist, _ = path.stem.rsplit("-", 2)
        red, green, blue = np.asarray(Image.open(path))[mask == 255].mean(0)
        assert red == pytest.approx(int(code.split("-")[-1], 16) % 200, abs=3)
        assert green == pytest.approx({"google": 50, "twitter": 120, "fluent": 200}[artist], abs=3)
        assert blue == pytest.approx(30, abs=3)


def test_backgrounds_are_of_the_split(packages):
    photos = emoji.read_photos(packages)
    train, val = (set(emoji.BACKGROUNDS[split]) for split in ("train", "val"))
    assert not train & val
    assert photos.keys() == train | val
    assert {name for name, photo in photos.items() if photo.getextrema()[2] == (0, 0)} == train


def test_backgrounds_in_the_pictures(built):
    """Whatever order the channels were put in: of a training photograph one stays dark, of a test one two."""
    for split, dark in (("train", 1), ("val", 2)):
        for path in (built / split / "animals").iterdir():
            mask = np.asarray(Image.open(built / "masks" / path.relative_to(built)))
            outside = np.asarray(Image.open(path))[mask == 0].astype(float).mean(0)
            low, middle, high = sorted(outside)
            gap = middle - low if dark == 1 else high - middle
            assert gap > 20, (path, outside)
            assert gap == max(middle - low, high - middle)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(built, packages, tmp_path):
    assert make(tmp_path / "again", packages, "--seed", "0").returncode == 0
    assert files(tmp_path / "again") == files(built)
    assert make(tmp_path / "other", packages, "--seed", "1").returncode == 0
    other = files(tmp_path / "other")
    assert code_points(tmp_path / "other" / "val") != code_points(built / "val")
    assert other["about.json"] != files(built)["about.json"]


def test_another_size_shows_the_same_scenes(built, packages, tmp_path):
    assert make(tmp_path / "large", packages, "--size", "64").returncode == 0
    assert files(tmp_path / "large").keys() == files(built).keys()
    for path in (tmp_path / "large" / "masks" / "val" / "food").iterdir():
        large = np.asarray(Image.open(path)) > 127
        small = np.asarray(Image.open(built / "masks" / "val" / "food" / path.name)) > 127
        for axis in (0, 1):
            ends = [np.nonzero(mask.any(axis))[0][[0, -1]] / len(mask) for mask in (large, small)]
            assert ends[0] == pytest.approx(ends[1], abs=0.06)


def test_about_says_what_and_whose(built):
    about = json.loads((built / "about.json").read_text())
    assert (about["size"], about["seed"]) == (32, 0)
    assert about["pictures"]["val"] == dict.fromkeys(emoji.GROUPS, 9)
    kinds = {split: sum(about["emoji"][split].values()) for split in ("train", "val")}
    assert kinds == {split: len(code_points(built / split)) for split in kinds}
    assert [source["package"] for source in about["sources"]] == [
        "emoji-datasource-google",
        "emoji-datasource-twitter",
        "@lobehub/fluent-emoji-3d",
        "scikit-image",
    ]
    assert all(source["version"] and source["licence"] for source in about["sources"])


def test_what_stands_is_left_alone(packages, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = make(tmp_path, packages)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"error: {tmp_path} exists and is not an empty folder - take another; it is left as it is\n"
    )
    assert files(tmp_path) == {"mine.txt": b"mine"}


@pytest.mark.parametrize("option", [("--size", "4"), ("--train", "0"), ("--seed", "-1")])
def test_numbers_out_of_range_are_refused(option, packages, tmp_path):
    done = make(tmp_path / "set", packages, *option)
    assert done.returncode == 2
    assert f"{option[0]} is {option[1]}; it must be" in done.stderr
    assert not (tmp_path / "set").exists()


def test_without_npm_it_says_what_to_do(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "set")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": str(tmp_path)}
    )
    assert done.returncode == 1
    assert "npm is not there - install it, or give --packages" in done.stderr
    assert not (tmp_path / "set").exists()


def test_a_package_that_cannot_be_fetched_is_named(tmp_path):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'no such package' >&2\nexit 1\n")
    npm.chmod(0o755)
    command = [sys.executable, str(SCRIPT), str(tmp_path / "set")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.returncode == 1
    assert "'npm pack emoji-datasource-google@16.0.0 --silent' failed: no such package" in done.stderr
    assert not (tmp_path / "set").exists()
