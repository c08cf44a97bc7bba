"""``pellucid pack`` and what takes its shards, as a user types it."""

import json

import numpy as np
import pytest
from PIL import Image

from pellucid.cli import main

TINY = ["--model", "crate_digits", "--img-size", "8", "--embed-dim", "16", "--depth", "2", "--num-heads", "2"]


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for i in range(15):
            path = tmp_path / "photos" / name / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (9, 10, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def run(*argv):
    return main([str(word) for word in argv])


def test_a_run_on_shards_is_the_run_on_the_files(photos, tmp_path, capsys):
    shards = tmp_path / "shards"
    assert run("pack", photos, shards, "--max-shard-mb", "0.02") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{shards}: 24 images to train on and 6 to test on, in 2 classes, in ")
    for data, out in ((photos, "a"), (shards, "b")):
        assert run("train", data, *TINY, "--epochs", 2, "--out", tmp_path / out, "--no-report") == 0
    weights = [(tmp_path / out / "model" / "model.safetensors").read_bytes() for out in "ab"]
    assert weights[0] == weights[1]
    assert run("evaluate", tmp_path / "b", "-o", tmp_path / "own.json") == 0
    assert run("evaluate", tmp_path / "a", shards, "-o", tmp_path / "other.json") == 0
    own, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("own", "other"))
    assert own == other
    assert own["count"] == 6
    assert run("check", shards) == 0


def test_what_was_left_out_is_told(photos, tmp_path, capsys):
    (photos / "cat" / "03.png").write_bytes(b"<html>")
    assert run("pack", photos, tmp_path / "shards") == 3
    assert "1 of 30 images rejected" in capsys.readouterr().err
    assert run("pack", photos, tmp_path / "shards", "--max-bad", "0.1") == 0
    said = capsys.readouterr().out
    assert "1 rejected and left out:\n  cat/03.png: an HTML page, not an image\n" in said
    assert run("pack", photos, tmp_path / "shards", "--max-bad", "0.1") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("pack", photos, tmp_path / "shards", "--max-bad", "0.1", "--overwrite") == 0


def test_labels_may_be_insisted_on(photos, tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(photos / "stray.png")
    assert run("pack", photos, tmp_path / "one") == 0
    assert "28 images to train on and 3 to test on, without labels" in capsys.readouterr().out
    assert run("pack", photos, tmp_path / "two", "--labels", "required") == 0
    assert "in 2 classes" in capsys.readouterr().out
    assert run("train", tmp_path / "one", *TINY, "--out", tmp_path / "x") == 3
    assert "--objective simdino" in capsys.readouterr().err


def test_audit_needs_no_labels(photos, tmp_path, capsys):
    flat, shards = tmp_path / "flat", tmp_path / "shards"
    flat.mkdir()
    for i, path in enumerate(sorted(photos.rglob("*.png"))):
        path.rename(flat / f"{i}.png")
    assert run("pack", flat, shards) == 0
    options = ["--objective", "simdino", "--epochs", 1, "--no-report"]
    for data, out in ((flat, "a"), (shards, "b")):
        assert run("train", data, *TINY, *options, "--out", tmp_path / out) == 0
    weights = [(tmp_path / out / "model" / "model.safetensors").read_bytes() for out in "ab"]
    assert weights[0] == weights[1]
    own, all_of_it = tmp_path / "own.json", tmp_path / "all.json"
    assert run("audit", tmp_path / "b", "-o", own) == 0
    assert run("audit", tmp_path / "b", flat, "-o", all_of_it) == 0
    assert [json.loads(path.read_text())["samples"] for path in (own, all_of_it)] == [3, 30]
