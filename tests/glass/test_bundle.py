"""From a real run to a bundle that JSON can hold, and a report that shows it."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from pellucid.data import load_data
from pellucid.glass.bundle import collect
from pellucid.glass.report import render
from pellucid.training import train

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    images = load_data("digits")
    runs = [
        train(images, model=name, model_args=TINY, epochs=1, out=str(folder / name), progress=False)
        for name in ("crate_digits", "vit_digits")
    ]
    return collect(runs, images, command="pellucid demo")


def test_json_holds_it(bundle):
    text = json.dumps(bundle, allow_nan=False)
    assert json.dumps(json.loads(text)) == text


def test_every_field_of_the_format_is_there(bundle):
    assert {"title", "created", "version", "command", "models", "data", "config"} == bundle.keys()
    for model in bundle["models"]:
        assert {
            "name",
            "label",
            "parameters",
            "seconds",
            "facts",
            "curves",
            "scores",
            "audit",
            "attention",
        } == model.keys()
        for split in ("train", "test"):
            columns = model["curves"][split]
            assert len(columns["epoch"]) == len(columns["loss"]) == len(columns["accuracy"]) > 0
        assert len(model["attention"]["images"]) == 8
        assert len(model["attention"]["images"][0]["layers"]) == 2
        assert sum(map(sum, model["scores"]["confusion"])) == 450
    assert [model["label"] for model in bundle["models"]] == ["CRATE", "ViT"]
    assert bundle["data"]["train"] == 1347


def test_pictures_are_the_pictures(bundle):
    images = load_data("digits")
    for shown in bundle["models"][0]["attention"]["images"]:
        head, data = shown["png"].split(",")
        assert head == "data:image/png;base64"
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        index = int(shown["name"].split("[")[1].rstrip("]"))
        index -= len(images.train) if index >= len(images.test) else 0
        assert pixels.shape == (8, 8)
        names = [images.test.name(i) for i in range(len(images.test))]
        np.testing.assert_array_equal(pixels, images.test.image(names.index(shown["name"]))[0].numpy())
        assert shown["grid"] == [4, 4]


def test_the_report_shows_it(bundle):
    html = render(bundle)
    assert bundle["models"][0]["audit"]["verdict"]["text"].split(" lower")[0] in html
    assert "pellucid demo" in html
    assert "ViT" in html


def test_hostile_names_stay_text(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("<script>alert(1)</script>".replace("/", "|"), 'a"b&c'):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for i in range(5):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / kind / f"<img onerror=x>{i}.png")
    images = load_data(tmp_path / "data")
    run = train(images, model_args=TINY, epochs=1, batch_size=4, out=str(tmp_path / "run"), progress=False)
    html = render(collect([run], images))
    assert "<script>alert" not in html
    assert "<img onerror" not in html
    assert "&lt;script&gt;alert(1)" in html
