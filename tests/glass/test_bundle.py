"""From a real run to a bundle that JSON can hold, and a report that shows it."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from pellucid.data import load_data
from pellucid.errors import ConfigError
from pellucid.glass.bundle import collect
from pellucid.glass.feed import eval_view
from pellucid.glass.pictures import png
from pellucid.glass.report import render
from pellucid.models import create_model
from pellucid.training import Run, TrainConfig, train

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
            "learnt",
            "health",
            "curves",
            "scores",
            "features",
            "views",
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
    scores = bundle["models"][0]["scores"]
    assert f"{scores['accuracy']:.1%}".rstrip("%") in html
    assert bundle["models"][0]["audit"]["verdict"]["text"].split(" lower")[0] in html
    assert "pellucid demo" in html
    assert "ViT" in html


def test_measured_values_are_those_of_the_model(bundle):
    subject, beside = bundle["models"]
    assert bundle["command"] == "pellucid demo"
    assert bundle["title"] == "crate_digits"
    assert len(subject["audit"]["rows"]) == len(beside["audit"]["rows"]) == 4
    assert subject["audit"]["samples"] == 256
    assert beside["audit"]["verdict"]["descends"] is None
    assert subject["scores"]["accuracy"] == pytest.approx(subject["curves"]["test"]["accuracy"][-1])
    assert dict(map(tuple, subject["facts"]))["tokens"] == dict(map(tuple, beside["facts"]))["tokens"] == "17"
    first = [model["attention"]["images"][0]["layers"][0]["heads"] for model in (subject, beside)]
    assert [len(heads) for heads in first] == [2, 2]
    assert all(len(head) == 16 and 0 < sum(head) <= 1 for heads in first for head in heads)
    assert {image["label"] for image in subject["attention"]["images"]} == set("01234567")
    assert bundle["config"]["model"] == "crate_digits"


def test_a_colour_picture_comes_back_as_it_was():
    model = create_model("crate_micro_patch4_32", img_size=(32, 24))
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 24)}
    view = eval_view(model)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 24), dtype=np.uint8)
    seen = view.batch([torch.from_numpy(pixels)], [0])[0]
    shown = Image.open(io.BytesIO(base64.b64decode(png(seen, view).split(",")[1])))
    assert (shown.mode, shown.size) == ("RGB", (24, 32))
    np.testing.assert_array_equal(np.asarray(shown).transpose(2, 0, 1), pixels)


def finished(folder, name, images, **options):
    """A run as training leaves it, with fresh weights."""
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    model = create_model(name, num_classes=len(images.class_names), in_chans=1, **options).eval()
    cfg = {"label_names": images.class_names, "mean": [0.5], "std": [0.5], "input_size": [1, 32, 32]}
    model.pretrained_cfg = {**vars(model)["pretrained_cfg"], **cfg}
    return Run(folder, TrainConfig(data=images.name, model=name, out=str(folder)), model, None, 0.0)


def test_a_model_without_tokens_is_shown_without_an_audit(tmp_path):
    images = load_data("digits")
    bundle = collect([finished(tmp_path / "run", "test_resnet", images)], images)
    json.dumps(bundle, allow_nan=False)
    subject = bundle["models"][0]
    assert subject["audit"] is None
    assert subject["label"] == "ResNet"
    assert all(image["layers"] == [] for image in subject["attention"]["images"])
    assert "ResNet" in render(bundle)


def test_runs_on_other_classes_are_refused(tmp_path):
    images = load_data("digits")
    run = finished(tmp_path / "run", "vit_digits", images, img_size=32)
    run.model.pretrained_cfg["label_names"] = [*images.class_names[:9], "ten"]
    with pytest.raises(ConfigError, match="learnt other classes than those of digits - give runs"):
        collect([run], images)


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
