"""The measurement of segmentation: its truth, its controls, its choice of a head, and that it goes on."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pellucid.data import load_data
from pellucid.models import create_model

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "segmentation.py"
spec = importlib.util.spec_from_file_location("benchmark_segmentation", SCRIPT)
script = importlib.util.module_from_spec(spec)
sys.modules["benchmark_segmentation"] = script  # dataclasses look their module up
spec.loader.exec_module(script)

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Squares of two colours, the class, on noise; as ``benchmarks/emoji.py`` lays its files out."""
    folder = tmp_path_factory.mktemp("squares")
    for split, count in (("train", 20), ("val", 8)):
        for k, kind in enumerate(("blue", "red")):
            for place in (folder / split / kind, folder / "masks" / split / kind):
                place.mkdir(parents=True)
            for i in range(count):
                random = np.random.default_rng([k, i, split == "val"])
                pixels = random.integers(90, 130, (32, 32, 3), dtype=np.uint8)
                top, left = random.integers(0, 3, 2) * 8
                mask = np.zeros((32, 32), dtype=np.uint8)
                mask[top : top + 16, left : left + 16] = 255
                pixels[mask > 0] = ((20, 20, 230), (230, 20, 20))[k]
                Image.fromarray(pixels).save(folder / split / kind / f"{i}.png")
                Image.fromarray(mask).save(folder / "masks" / split / kind / f"{i}.png")
    return folder


def asked(data, out, rows, **more):
    return Namespace(data=str(data), out=out, rows=rows, seeds=[0], epochs=0.5, limit=12, **more)


def test_pictures_are_read_with_their_masks(data):
    pictures = script.Pictures.read(data, "val", 6)
    assert pictures.images.shape == (6, 3, 32, 32)
    assert pictures.kinds == ["blue"] * 3 + ["red"] * 3
    truth = pictures.truth((4, 4))
    assert truth.sum((1, 2)).tolist() == [4] * 6
    for image, mask in zip(pictures.images, pictures.masks, strict=True):
        assert (image.amax(0)[mask > 0.5] == 230).all()
    with pytest.raises(SystemExit, match="holds no pictures"):
        script.Pictures.read(data, "nowhere", 6)


def test_a_patch_is_the_objects_where_more_than_half_is_covered():
    masks = torch.zeros(1, 4, 4)
    masks[0, :2, :2] = torch.tensor([[1, 1], [0.2, 0]])
    masks[0, 2:, 2:] = 0.5
    pictures = script.Pictures(torch.zeros(1, 3, 4, 4), masks, ["x"])
    assert pictures.truth((2, 2))[0].tolist() == [[True, False], [False, False]]


def test_controls_by_hand():
    masks = torch.zeros(2, 8, 8)
    masks[0, 2:6, 2:6] = 1
    masks[1, :4, :4] = 1
    pictures = script.Pictures(torch.zeros(2, 3, 8, 8), masks, ["x", "x"])
    centred = script.Pictures(pictures.images[:1], masks[:1], ["x"])
    found = script.controls((4, 4), centred, pictures)
    assert found["all of the picture"]["iou"] == pytest.approx(0.25)
    assert found["the middle 2 x 2 patches"]["iou"] == pytest.approx((1 + 1 / 7) / 2)


def test_a_long_token_is_counted(data):
    model = create_model("crate_micro_patch4_32", **TINY).eval()
    pictures = script.Pictures.read(data, "val", 4)
    before = script.outliers(model, pictures)
    assert len(before) == 2
    with torch.no_grad():
        model.embed.pos_embed[0, 5] *= 1e4  # one patch of sixteen, in front of the first layer
    model.layers[0]["compress"].step_size = 0.0
    tokens = []
    model.layers[0]["sparsify"].enter = torch.nn.Identity()
    with torch.no_grad():
        model.forward_features(torch.zeros(1, 3, 32, 32), on_step=lambda r: tokens.append(r.z_next))
    share = script.outliers(model, pictures)[0]
    norms = tokens[1][:, 1:].norm(dim=-1)
    assert (norms > 3 * norms.median()).sum() == 1
    assert share == pytest.approx(1 / 16)


@pytest.mark.parametrize("model", ["crate_micro_patch4_32", "vit_micro_patch4_32", "tost_micro_patch4_32"])
def test_every_kind_of_model_is_measured(data, model):
    parts = [script.Pictures.read(data, split, 6) for split in ("train", "val")]
    found = script.measure(create_model(model, **TINY).eval(), *parts)
    for key in script.COLUMNS:
        assert 0 <= found[key] <= 1
    assert found["heads count"] >= found["fixed head count"]
    assert found["maskcut best"] >= found["maskcut"]
    assert (found["pictures"], found["left out"]) == (6, 0)


def test_it_goes_on_where_it_stopped(data, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SIZE", TINY)
    images = load_data(str(data))
    first = list(script.rows(asked(data, tmp_path, ["CRATE"]), images))
    assert [row["model"] for row in first[:2]] == ["CRATE", "CRATE, untrained"]
    assert first[2]["model"] == "all of the picture"
    monkeypatch.setattr(script, "train", lambda *args, **options: pytest.fail("trained again"))
    monkeypatch.setattr(script, "measure", lambda *args: pytest.fail("measured again"))
    assert list(script.rows(asked(data, tmp_path, ["CRATE"]), images)) == first
    table = script.table(first)
    assert table.count("\n") == 5
    assert "CRATE, untrained" in table
    assert json.loads(json.dumps(first)) == first
